"""Readers measured in turn, several rounds, each beside raw epochs of the same bytes in between.

rounds = measure(readers, raw, num_points, num_rounds=5)      A B C ... A B C ...: a slow minute hurts them all
print(table(rounds, point_bytes))                             medians; absolute figures drift, ratios do not

(open -> first batch -> rest of the first epoch, a raw one) x NUM_FIRST -> epochs until ENOUGH_S have passed, a raw one
after each
"""

import gc
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BATCH = 32
ENOUGH_S, TOO_LONG_S = 1.0, 4.0
"""A reader is timed over whole epochs for at least this long, and broken off within an epoch after that long."""
NUM_FIRST = 5
"""A first epoch of ours takes 50 ms: opened once a turn, one hiccup of the machine is the result."""

Order = NDArray[np.int64]
Batch = tuple[Order, Tensor]
"""Which points [BATCH], and their values [BATCH, F, C, H, W], good until the next batch."""


class Reader(Protocol):
    """One way to keep points on disk and to read them shuffled. What it must import, it imports when it is made."""

    name: str

    def write(self, points: NDArray[Any]) -> None:
        """All points [N, F, C, H, W], once."""

    def open(self) -> None:
        """As at the start of a training run: nothing is known but the folder."""

    def epoch(self, order: Order) -> Iterator[Batch]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One reader in one round."""

    first_batch_s: float
    """Opening included, imports not."""
    first_epoch_share: float
    rate: float
    """Points per second, in the epochs after the first one; in that one where it took too long already."""
    share: float
    """The same, of what the raw epoch right after each gave."""
    grown_bytes: int
    """Peak resident memory above what was there before the turn; mapped files count."""


Rounds = dict[str, list[Turn]]


def measure(readers: Sequence[Reader], raw: Reader, num_points: int, *, num_rounds: int,
            dropped: Path | None = None) -> Rounds:  # fmt: skip
    """`dropped`: a folder whose files leave the page cache first, and come back as a shuffled epoch reads them: the
    pages of a training run whose set came from elsewhere. None: those of whoever has just written them, larger ones."""
    # Stacking a batch over two threads on a machine whose cores are busy is a hundred times slower: they spin.
    torch.set_num_threads(1)
    rounds: Rounds = {reader.name: [] for reader in readers}
    if dropped is not None:
        drop(dropped)
    warm = np.arange(num_points) if dropped is None else np.random.default_rng(0).permutation(num_points)
    for reader in readers:  # the page cache warm, also for whom was written first
        reader.open()
        _rate(reader.epoch(warm))
        reader.close()
    raw.open()
    for number in range(num_rounds):
        for reader in readers:
            rounds[reader.name].append(_turn(reader, raw, _orders(num_points, seed=number)))
    raw.close()
    return rounds


def drop(folder: Path) -> None:
    """From the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _orders(num_points: int, seed: int) -> Iterator[Order]:
    rng = np.random.default_rng(seed)
    while True:
        yield rng.permutation(num_points)


def _turn(reader: Reader, raw: Reader, orders: Iterator[Order]) -> Turn:
    gc.collect()
    limits = [_rate(raw.epoch(next(orders)))[0]]
    before = _reset_peak()
    first_batches_s, first_shares, broken_off = [], [], False
    while len(first_shares) < NUM_FIRST and not broken_off:
        if first_shares:
            reader.close()
        start = time.perf_counter()
        reader.open()
        batches = reader.epoch(next(orders))
        next(batches)
        first_batches_s.append(time.perf_counter() - start)
        first, broken_off = _rate(batches)
        limits.append(_rate(raw.epoch(next(orders)))[0])
        first_shares.append(first / statistics.mean(limits[-2:]))
    rates = [first] if broken_off else []
    start = time.perf_counter()
    # Whole epochs in turn: batch by batch, a reader's threads would work during the raw batches, and slow them.
    while not broken_off and (not rates or time.perf_counter() - start < ENOUGH_S):
        rates.append(_rate(reader.epoch(next(orders)))[0])
        limits.append(_rate(raw.epoch(next(orders)))[0])
    grown = _memory("VmHWM") - before
    del batches
    reader.close()
    shares = [rate / limit for rate, limit in zip(rates, limits[-len(rates) :], strict=True)]
    return Turn(first_batch_s=statistics.median(first_batches_s), first_epoch_share=statistics.median(first_shares),
                rate=statistics.median(rates), share=statistics.median(shares), grown_bytes=grown)  # fmt: skip


def _rate(batches: Iterator[Batch]) -> tuple[float, bool]:
    """Points per second, and whether it was broken off."""
    start, num_points, passed = time.perf_counter(), 0, 0.0
    for numbers, _ in batches:
        num_points += len(numbers)
        passed = time.perf_counter() - start
        if passed > TOO_LONG_S:
            return num_points / passed, True
    return num_points / passed, False


def _reset_peak() -> int:
    """Linux forgets the peak of a process when 5 is written there; what is resident now is the new peak."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def table(rounds: Rounds, point_bytes: int) -> list[str]:
    head = f"| {'reader':<50} | points/s |  GB/s | share of raw (lowest-highest) | first batch | memory |"
    rows = [head, "|" + "|".join("-" * len(cell) for cell in head.split("|")[1:-1]) + "|"]
    for name, turns in rounds.items():
        rate, first_s = middle(turns, "rate"), middle(turns, "first_batch_s")
        share = sorted(turn.share for turn in turns)
        spread = f"{statistics.median(share):.3f} ({share[0]:.3f}-{share[-1]:.3f})"
        grown = max(turn.grown_bytes for turn in turns)
        rows.append(f"| {name:<50} | {rate:8.0f} | {rate * point_bytes / 1e9:5.2f} | {spread:>29} "
                    f"| {first_s * 1e3:8.1f} ms | {grown / 1e6:3.0f} MB |")  # fmt: skip
    return rows


def middle(turns: Sequence[Turn], of: str) -> float:
    return statistics.median(getattr(turn, of) for turn in turns)


def times(rounds: Rounds, name: str, other: str) -> float:
    """How much faster one is than the other, round by round."""
    return statistics.median(a.share / b.share for a, b in zip(rounds[name], rounds[other], strict=True))
