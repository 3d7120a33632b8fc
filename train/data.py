"""From samples to tensors: extents into reused buffers, texts once each, ahead of the step.

    feed = Feed(shards, order, global_batch=96, micro_batch=32, rank=0, world=1)
    for step in feed:                        a Step: micro-batches of this rank, the cursor after it
        for micro in step.micros: micro.latents ... micro.text, micro.lengths, micro.inverse

    samples -> their extents, read by a thread into one of two sets of buffers -> tensors over the same memory

A text belongs to many samples: a batch carries its distinct texts once, and `inverse` says whose is whose.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import BadUsage, Fault, Partial
from common.record import Array
from common.shard_header import FIELDS
from common.shards import ShardReader, ShardSet
from train.order import Batch, Order, Sample

MAX_OPEN_SHARDS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Micro:
    """What one forward of one rank needs."""

    latents: Tensor  # [B, C, H, W] as stored
    cond: Tensor  # [B, C, H, W]
    uncond: Tensor  # [B, C, H, W]
    timesteps: Tensor  # [B] float32
    sigmas: Tensor  # [B] float32
    expert: Tensor  # [B] int64
    text: Tensor  # [U, L, D], zero beyond each one's length
    lengths: Tensor  # [U] int64
    inverse: Tensor  # [B] int64 into U

    def to(self, device: torch.device) -> "Micro":
        return Micro(**{name: getattr(self, name).to(device, non_blocking=True) for name in self.__slots__})


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    micros: tuple[Micro, ...]
    ids: tuple[str, ...]
    """Of all ranks, in global order."""
    epoch: int
    cursor: dict[str, list[int]]
    """Where the order stands after this step."""


class Shelf:
    """Opened shards, the least used closed first."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._open: OrderedDict[str, ShardReader] = OrderedDict()

    def reader(self, sample: Sample) -> ShardReader:
        item = sample.receipt.item
        if item not in self._open:
            self._open[item] = self._shards.read(sample.receipt)
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(item)
        return self._open[item]


def read_micro(shelf: Shelf, samples: tuple[Sample, ...], points: Array) -> Micro:
    """`points` [B, 3, C, H, W] is filled in place; the tensors share its memory."""
    texts: dict[tuple[str, int], int] = {}
    rows: list[Array] = []
    inverse, scalars = [], []
    for row, sample in enumerate(samples):
        reader = shelf.reader(sample)
        reader.read_point(sample.record, sample.point, points[row].data.cast("B"))
        header, where = reader.header, (sample.record, sample.point)
        scalars.append((header.timesteps[where], header.sigmas[where], header.expert[where]))
        prompt = header.prompt_of[sample.record]
        name = (sample.receipt.item, prompt)
        if name not in texts:
            texts[name] = len(rows)
            rows.append(reader.read_text(prompt))
        inverse.append(texts[name])
    text = np.zeros((len(rows), max(map(len, rows)), rows[0].shape[1]), rows[0].dtype)
    for padded, row_text in zip(text, rows, strict=True):
        padded[: len(row_text)] = row_text
    timesteps, sigmas, expert = (np.array(column) for column in zip(*scalars, strict=True))
    return Micro(
        **{name: torch.from_numpy(points[:, i]) for i, name in enumerate(FIELDS)},
        timesteps=torch.from_numpy(timesteps),
        sigmas=torch.from_numpy(sigmas),
        expert=torch.from_numpy(expert.astype(np.int64)),
        text=torch.from_numpy(text),
        lengths=torch.tensor([len(row) for row in rows]),
        inverse=torch.tensor(inverse),
    )


class Feed:
    """Steps, one ahead of the training loop, read by a thread. Every wait has a deadline."""

    def __init__(self, shards: ShardSet, order: Order, *, global_batch: int, micro_batch: int, rank: int, world: int,
                 deadline_s: float = 300.0) -> None:  # fmt: skip
        self.num_micros = accumulation(global_batch, micro_batch, world)
        self._shelf, self._order = Shelf(shards), order
        self._global_batch, self._micro_batch, self._rank, self._world = global_batch, micro_batch, rank, world
        self._channels, self._stride = shards.contract.latent_channels, shards.contract.latent_stride
        self._dtype, self._deadline_s = shards.contract.storage_dtype, deadline_s
        self._buffers: dict[tuple[int, tuple[int, int]], Array] = {}
        self._ready: queue.Queue[Step | BaseException] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Step]:
        while True:
            try:
                step = self._ready.get(timeout=self._deadline_s)
            except queue.Empty:
                raise Partial(
                    wrong="no batch came from the set",
                    found=f"{self._deadline_s:.0f} s of silence",
                    mend="look at the disk that holds it, or raise deadline_s",
                ) from None
            if isinstance(step, BaseException):
                raise step
            yield step

    def close(self) -> None:
        self._closed.set()

    def _fill(self) -> None:
        # Three sets: one in the loop's hands, one waiting, one being filled.
        number = 0
        while not self._closed.is_set():
            try:
                item: Step | BaseException = self._read(self._order.next_batch(self._global_batch), number % 3)
            except (Fault, OSError) as error:
                item = error
            while not self._closed.is_set():
                try:
                    self._ready.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            number += 1

    def _read(self, batch: Batch, buffer: int) -> Step:
        mine = batch.for_rank(self._rank, self._world)
        points = self._points(buffer, batch.size)
        micros = []
        for start in range(0, len(mine), self._micro_batch):
            part = slice(start, start + self._micro_batch)
            micros.append(read_micro(self._shelf, mine[part], points[part]))
        ids = tuple(sample.id for sample in batch.samples)
        return Step(micros=tuple(micros), ids=ids, epoch=batch.epoch, cursor=self._order.cursor)

    def _points(self, buffer: int, size: tuple[int, int]) -> Array:
        if (buffer, size) not in self._buffers:
            height, width = (side // self._stride for side in size)
            shape = (self._global_batch // self._world, len(FIELDS), self._channels, height, width)
            self._buffers[buffer, size] = np.empty(shape, self._dtype)
        return self._buffers[buffer, size]


def accumulation(global_batch: int, micro_batch: int, world: int) -> int:
    """Forwards per optimizer step and rank; a global batch that does not divide is refused with the nearest."""
    unit = micro_batch * world
    if global_batch % unit:
        below = max(unit, global_batch // unit * unit)
        raise BadUsage(
            wrong=f"global_batch {global_batch} does not divide by batch_size {micro_batch} x {world} processes",
            found=f"{global_batch / unit:.2f} forwards",
            mend=f"set global_batch to {below} or {below + unit}, or another batch_size",
        )
    return global_batch // unit
