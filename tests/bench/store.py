"""Our set and the limit under it: what is written and read here is what harvest and training write and read.

RawReader       one flat file, preadv into reused buffers: no reader of the same bytes can be faster
OurReader       a ShardSet in one container, by offset through its extents into reused buffers
BareReader      the same reads without our code
BareRingReader  the same by two processes at once
FeedReader      what a training loop is given: its own order, texts and noise levels too; in process or by a ring
"""

import dataclasses
import itertools
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.record import Contract, Record
from common.shard_reader import OffsetReader, ShardReader
from common.shards import ShardSet
from tests.bench.bare_ring import BareRing
from tests.bench.rounds import BATCH, Batch, Order
from tests.made import NUMERICS, made_contract, made_record

KEEP = 4
"""Points per record."""
RECORDS_PER_SHARD = 32


class Buffer:
    """Memory for one batch, and everything that is made of it once."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        # Page-aligned, as a ring in shared memory is: where malloc happens to put it moves a read by a tenth.
        memory = mmap.mmap(-1, BATCH * int(np.prod(shape)) * np.dtype(np.float16).itemsize)
        array = np.frombuffer(memory, np.float16).reshape(BATCH, *shape)
        self.tensor = torch.from_numpy(array)
        self.slots = [row.data.cast("B") for row in array]


class RawReader:
    """The limit."""

    name = "raw preadv"

    def __init__(self, folder: Path) -> None:
        self._path, self._shape_path = folder / "points.bin", folder / "shape"

    def write(self, points: NDArray[Any]) -> None:
        self._path.parent.mkdir(parents=True)
        points.tofile(self._path)
        self._shape = points.shape[1:]

    def open(self) -> None:
        self._fd = os.open(self._path, os.O_RDONLY)
        self._buffer = Buffer(self._shape)

    def epoch(self, order: Order) -> Iterator[Batch]:
        fd, preadv, length = self._fd, os.preadv, int(np.prod(self._shape)) * 2
        slots = [[slot] for slot in self._buffer.slots]
        for numbers in order.reshape(-1, BATCH):
            for number, slot in zip(numbers.tolist(), slots, strict=True):
                preadv(fd, slot, number * length)
            yield numbers, self._buffer.tensor

    def close(self) -> None:
        os.close(self._fd)
        del self._buffer


class OurReader:
    """The granary, in one of its containers."""

    def __init__(self, folder: Path, container: str) -> None:
        self.name, self._container, self.folder = f"ours, {container}", container, folder

    def write(self, points: NDArray[Any]) -> None:
        contract = contract_of(points)
        shards = ShardSet.create(self.folder, contract)
        records = [
            record_of(number, points[start : start + KEEP], contract)
            for number, start in enumerate(range(0, len(points), KEEP))
        ]
        parts = [records[start : start + RECORDS_PER_SHARD] for start in range(0, len(records), RECORDS_PER_SHARD)]
        # The manifest is sorted by item; the order in which they were written says which point is where.
        self._items = [shards.commit(part, NUMERICS, container=self._container).item for part in parts]
        self.shape = points.shape[1:]

    def open(self) -> None:
        self._shards = ShardSet.open(self.folder)
        self._by_item = self._shards.manifest().by_item
        self._readers: dict[int, ShardReader] = {}
        self._buffer = Buffer(self.shape)
        # An order of ours says shard, record and point; numbers are this bench's.
        self._places = [place(number) for number in range(self.num_shards * RECORDS_PER_SHARD * KEEP)]

    def epoch(self, order: Order) -> Iterator[Batch]:
        places, readers = self._places, self._readers
        for numbers in order.reshape(-1, BATCH):
            for number, slot in zip(numbers.tolist(), self._buffer.slots, strict=True):
                shard, record, point = places[number]
                (readers.get(shard) or self.reader(shard)).read_point(record, point, slot)
            yield numbers, self._buffer.tensor

    def close(self) -> None:
        del self._shards, self._readers, self._buffer, self._places

    @property
    def num_shards(self) -> int:
        return len(self._items)

    def shard_paths(self) -> list[Path]:
        """In the order in which they were written, for stock readers."""
        shards = ShardSet.open(self.folder)
        by_item = shards.manifest().by_item
        return [shards.shards_dir / f"{by_item[item].stem}.{self._container}" for item in self._items]

    def offsets(self) -> Iterator[tuple[Path, list[int]]]:
        """Of all points, by file, in the order in which they were written."""
        for shard in range(self.num_shards):
            reader = self.reader(shard)
            assert isinstance(reader, OffsetReader)
            yield reader.tables.points.path, reader.tables.points.offsets.tolist()

    def numbers(self) -> dict[tuple[str, int, int], int]:
        """Which point a sample (item, record, point) is."""
        every = itertools.product(range(self.num_shards), range(RECORDS_PER_SHARD), range(KEEP))
        return {(self._items[shard], record, point): (shard * RECORDS_PER_SHARD + record) * KEEP + point
                for shard, record, point in every}  # fmt: skip

    def reader(self, shard: int) -> ShardReader:
        reader = self._readers.get(shard)
        if reader is None:
            reader = self._readers[shard] = self._shards.read(self._by_item[self._items[shard]])
        return reader


class BareReader:
    """What OurReader asks of the disk, without its code: one bare preadv a point, at our offsets in our files. What is
    missing from it to `raw preadv` is where the bytes lie, the rest is ours."""

    def __init__(self, ours: OurReader) -> None:
        self.name, self._ours = f"bare preadv at the offsets of: {ours.name}", ours

    def write(self, points: NDArray[Any]) -> None:
        """They stand there already."""

    def open(self) -> None:
        self._ours.open()
        self._buffer, self._fds, self._places = Buffer(self._ours.shape), [], []
        for path, offsets in self._ours.offsets():
            self._fds.append(os.open(path, os.O_RDONLY))
            self._places += [(self._fds[-1], offset) for offset in offsets]

    def epoch(self, order: Order) -> Iterator[Batch]:
        places, preadv, slots = self._places, os.preadv, [[slot] for slot in self._buffer.slots]
        for numbers in order.reshape(-1, BATCH):
            for number, slot in zip(numbers.tolist(), slots, strict=True):
                fd, offset = places[number]
                preadv(fd, slot, offset)
            yield numbers, self._buffer.tensor

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._ours.close()


class BareRingReader:
    """Two processes at once, with nothing of ours: the limit of the ring, on this machine."""

    def __init__(self, ours: OurReader) -> None:
        self.name, self._ours = f"bare ring of 2: {ours.name}", ours

    def write(self, points: NDArray[Any]) -> None:
        """They stand there already."""

    def open(self) -> None:
        self._ours.open()
        places = [(str(path), offset) for path, offsets in self._ours.offsets() for offset in offsets]
        self._ring = BareRing(places, 2 * int(np.prod(self._ours.shape)), BATCH)

    def epoch(self, order: Order) -> Iterator[Batch]:
        for numbers, points in self._ring.epoch(order):
            yield numbers, torch.from_numpy(points.view(np.float16).reshape(BATCH, *self._ours.shape))

    def close(self) -> None:
        self._ring.close()
        self._ours.close()


class FeedReader:
    """Training's own feed over the same set: without held-out records, in its own order, ahead of who asks."""

    epochs_at_once = 4
    """What is read ahead while raw epochs are timed is then a hundredth of what is timed."""

    def __init__(self, ours: OurReader, num_workers: int) -> None:
        how = f"ring of {num_workers}" if num_workers else "a thread"
        self.name, self._ours, self.num_workers = f"feed by {how}: {ours.name}", ours, num_workers
        self._cpu_s, self._wall_s = 0.0, 0.0

    def write(self, points: NDArray[Any]) -> None:
        """They stand there already."""

    def open(self) -> None:
        from train.feed.data import Feed
        from train.feed.order import Order as FeedOrder

        self._ours.open()
        self._number_of = self._ours.numbers()
        shards = ShardSet.open(self._ours.folder)
        receipts = shards.manifest().receipts
        order = FeedOrder(0, lambda epoch: receipts)
        self._num_batches = order.epoch_length(0) // BATCH
        self._feed = Feed(shards, order, global_batch=BATCH, micro_batch=BATCH, rank=0, world=1,
                          read_workers=self.num_workers)  # fmt: skip
        self._steps, self._unnamed, self._is_timed = iter(self._feed), np.arange(BATCH), False

    def epoch(self, order: Order) -> Iterator[Batch]:
        is_timed, self._is_timed = self._is_timed, True
        for _ in range(self.epochs_at_once * self._num_batches):
            cpu, wall = time.thread_time(), time.perf_counter()
            step = next(self._steps)
            if is_timed:
                self._cpu_s += time.thread_time() - cpu
                self._wall_s += time.perf_counter() - wall
            self._samples = step.samples
            latents = step.micros[0].latents.numpy()  # every third part of the points
            field = latents[0].nbytes
            shape, strides = (BATCH, 3, *latents.shape[1:]), (3 * field, field, *latents.strides[1:])
            yield self._unnamed, torch.from_numpy(np.lib.stride_tricks.as_strided(latents, shape, strides))

    @property
    def cpu_share(self) -> float:
        """Of the time of the thread that asks, in epochs after the first one: starting is waiting."""
        return self._cpu_s / self._wall_s if self._wall_s else float("nan")

    def numbers(self) -> Order:
        """Of the last batch; an epoch does not stop to say."""
        named = [(sample.receipt.item, sample.record, sample.point) for sample in self._samples]
        return np.array([self._number_of[name] for name in named])

    def close(self) -> None:
        self._feed.close()
        self._ours.close()


def place(number: int) -> tuple[int, int, int]:
    """Shard, record, point: where we put the point of that number."""
    record, point = divmod(number, KEEP)
    return *divmod(record, RECORDS_PER_SHARD), point


def contract_of(points: NDArray[Any]) -> Contract:
    """Square latents of that many channels, KEEP points a record."""
    channels = points.shape[2]
    ones = (1.0,) * channels
    return made_contract(keep=KEEP, latent_channels=channels, latent_mean=ones, latent_std=ones)


def record_of(number: int, points: NDArray[Any], contract: Contract) -> Record:
    """A record that holds these points [KEEP, 3, C, H, W]."""
    small = made_record(number, made_contract(keep=KEEP, latent_channels=1), side=8)
    latents, cond, uncond = points.swapaxes(0, 1)
    side = points.shape[-1] * contract.latent_stride
    return dataclasses.replace(
        small, height=side, width=side, latents=latents, cond=cond, uncond=uncond, final=latents[-1]
    )
