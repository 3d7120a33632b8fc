"""The store part: who is measured, the table, and the goals line by line."""

import dataclasses
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.bench.costs import allocated_per_step, open_many
from tests.bench.loaders import Litdata, Mds, MdsByNumber, Webdataset
from tests.bench.peers import Lmdb, LmdbAsTensors, Safetensors, Tensorstore, ZarrPython
from tests.bench.rounds import BATCH, Reader, Rounds, measure, middle, table, times
from tests.bench.store import BareReader, BareRingReader, FeedReader, OurReader, RawReader

POINT_SHAPE = (3, 16, 64, 64)
"""latents, cond, uncond of a 512 x 512 picture."""
SHUFFLED, FIRST_EPOCH, FIRST_BATCH_MS = 0.90, 0.45, 50
RING, RING_CPU = 1.0, 0.10
WITH_A_FOLDER: tuple[Any, ...] = (Safetensors, Lmdb, LmdbAsTensors, Litdata, Mds, MdsByNumber, Webdataset)
ON_OUR_ZARR: tuple[Any, ...] = (Tensorstore, ZarrPython)
TIMES: dict[Any, float] = {Webdataset: 9, Mds: 7, Litdata: 3, LmdbAsTensors: 2, Lmdb: 2}
OPEN_S, OPEN_MB, TRANSIENT_BYTES = 2.0, 300, 16_384


def store_report(folder: Path, num_points: int, num_rounds: int, num_receipts: int, pages: str) -> dict[str, Any]:
    num_points = max(1, num_points // BATCH) * BATCH
    points = made_points(num_points)
    readers, absent = make_readers(folder)
    for reader in readers:
        reader.write(points)
    point_bytes = points[0].nbytes
    del points
    print(f"{num_points} points of {point_bytes} bytes, batches of {BATCH}, shuffled, page cache warm ({pages}), one "
          f"thread; {num_rounds} rounds, medians")  # fmt: skip
    rounds = measure(readers, copy(readers[0]), num_points, num_rounds=num_rounds,
                     dropped=folder if pages == "read" else None)  # fmt: skip
    print("\n".join(table(rounds, point_bytes)))
    for name in absent:
        print(f"{name}: not installed")
    opened = open_many(folder / "many", num_receipts)
    allocated = {reader.name: allocated_per_step(reader, num_points) for reader in ours(readers)}
    rings = [reader for reader in readers if isinstance(reader, FeedReader) and reader.num_workers]
    print("\n" + "\n".join(goals(rounds, opened, allocated, rings)))
    turns = {name: [dataclasses.asdict(turn) for turn in of_one] for name, of_one in rounds.items()}
    return {"turns": turns, "opened": opened, "allocated_per_step": allocated, "not_installed": absent}


def made_points(num_points: int, shape: tuple[int, ...] = POINT_SHAPE) -> NDArray[np.float16]:
    """Random finite values, quickly: every 15-bit pattern below infinity."""
    bits = np.random.default_rng(0).integers(0, 0x7C00, (num_points, *shape), np.uint16)
    return bits.view(np.float16)


def make_readers(folder: Path) -> tuple[list[Reader], list[str]]:
    """Those that can be made here, and the names of those that cannot."""
    zarr, tar = OurReader(folder / "zarr", "zarr"), OurReader(folder / "tar", "tar")
    readers: list[Reader] = [RawReader(folder / "raw"), zarr, BareReader(zarr), tar, BareReader(tar)]
    for container in (zarr, tar):
        readers += [FeedReader(container, 0), FeedReader(container, 2), BareRingReader(container)]
    absent = []
    for number, peer in enumerate((*WITH_A_FOLDER, *ON_OUR_ZARR)):
        peer_dir = folder / f"peer-{number}"
        peer_dir.mkdir(parents=True)
        try:
            readers.append(peer(peer_dir) if peer in WITH_A_FOLDER else peer(zarr))
        except ImportError:
            absent.append(peer.name)
    return readers, absent


def ours(readers: list[Reader]) -> list[OurReader]:
    return [reader for reader in readers if isinstance(reader, OurReader)]


def goals(
    rounds: Rounds, opened: dict[str, float], allocated: dict[str, int], rings: Sequence[FeedReader]
) -> list[str]:
    """One line each: holds or misses, what was wanted, what was found."""
    lines = []

    def line(name: str, found: float, wanted: float, *, at_most: bool = False) -> None:
        holds = found <= wanted if at_most else found >= wanted
        lines.append(f"{'holds ' if holds else 'MISSES'} {name}: {found:.4g} ({'<=' if at_most else '>='} {wanted:g})")

    for name in allocated:
        turns = rounds[name]
        line(f"{name}: share of raw once checked", middle(turns, "share"), SHUFFLED)
        line(f"{name}: share of raw in the first, verifying epoch", middle(turns, "first_epoch_share"), FIRST_EPOCH)
        for peer, wanted in TIMES.items():
            if peer.name in rounds:
                line(f"{name}: times {peer.name}", times(rounds, name, peer.name), wanted)
        line(f"{name}: first batch, ms", middle(turns, "first_batch_s") * 1e3, FIRST_BATCH_MS, at_most=True)
        line(f"{name}: bytes allocated by a step", allocated[name], TRANSIENT_BYTES, at_most=True)
    for ring in rings:
        line(f"{ring.name}: share of raw", middle(rounds[ring.name], "share"), RING)
        line(f"{ring.name}: of the asking thread's time, CPU", ring.cpu_share, RING_CPU, at_most=True)
    many = f"{opened['receipts']:.0f} receipts open"
    line(f"{many} ({opened['cpu_s']:.2f} s of CPU), s", opened["seconds"], OPEN_S, at_most=True)
    line(f"{many}, peak MB", opened["peak_mb"], OPEN_MB, at_most=True)
    return lines
