"""From samples to tensors: extents into reused memory, texts once each, ahead of the step.

    with Feed(shards, order, global_batch=96, micro_batch=32, rank=0, world=1) as feed:
        for step in feed:                    a Step: micro-batches of this rank, the cursor after it
            for micro in step.micros: micro.latents ... micro.text, micro.lengths, micro.inverse

    order -> samples of this rank, by micro-batch -> slots, filled ahead by a thread (train/feed/reading.py) or by
    processes (train/feed/ring.py) -> tensors over the same memory

A step's memory is used again when the next step is asked for. A loop that waits for its data has one step read ahead,
into memory that is still in the caches; one that does not wait has up to MOST_AHEAD. Nothing is allocated after the
first rounds but small Python objects.
"""

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from common.errors import BadUsage
from common.shards import ShardSet
from train.feed.filling import Options
from train.feed.order import Batch, Order, Samples, Size
from train.feed.pieces import Filled
from train.feed.reading import Part, PartReader, ThreadReader
from train.feed.ring import Ring
from train.feed.slots import Slot, SlotPlan, Spans

MOST_AHEAD = 3
"""Steps that are kept ready for a loop that is slower than its readers: what a disk's hiccup may cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Micro:
    """What one forward of one rank needs."""

    latents: Tensor  # [B, C, H, W] as stored
    cond: Tensor | None = None  # [B, C, H, W]
    uncond: Tensor | None = None  # [B, C, H, W]
    guided: Tensor | None = None  # [B, C, H, W], where the set keeps only the combination
    timesteps: Tensor  # [B] float32
    sigmas: Tensor  # [B] float32
    expert: Tensor  # [B] int64
    text: Tensor  # [U, L, D], zero beyond each one's length
    lengths: Tensor  # [U] int64
    inverse: Tensor  # [B] int64 into U
    end: Tensor | None = None  # [B, C, H, W], where the point's segment ends; None: nobody asked
    end_timesteps: Tensor | None = None  # [B] float32
    end_sigmas: Tensor | None = None  # [B] float32

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        named = {name: getattr(self, name) for name in self.__slots__}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device) -> "Micro":
        return Micro(**{name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors().items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    micros: tuple[Micro, ...]
    samples: Samples
    """Of all ranks, in global order."""
    epoch: int
    cursor: dict[str, list[int]]
    """Where the order stands after this step."""

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(sample.id for sample in self.samples)


class Tray:
    """A slot and the tensors over it."""

    FIXED = ("timesteps", "sigmas", "expert", "inverse")

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._fixed = {name: torch.from_numpy(getattr(slot, name)) for name in self.FIXED}
        self._fixed |= {name: torch.from_numpy(area) for name, area in (slot.fields | slot.ends).items()}
        self._lengths = torch.from_numpy(slot.lengths)
        self.micro = functools.lru_cache(maxsize=64)(self._micro)

    def _micro(self, num_texts: int, longest: int) -> Micro:
        text = torch.from_numpy(self.slot.text(num_texts, longest))
        return Micro(**self._fixed, text=text, lengths=self._lengths[:num_texts])


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """A step that is being read."""

    size: Size
    trays: tuple[Tray, ...]
    parts: tuple[Part, ...]
    samples: Samples
    epoch: int
    cursor: dict[str, list[int]]


class Feed:
    """Steps, read ahead of the training loop. Every wait has a deadline that names who is late with what."""

    def __init__(self, shards: ShardSet, order: Order, *, global_batch: int, micro_batch: int, rank: int, world: int,
                 deadline_s: float = 300.0, read_workers: int = 0, on_corrupt: str = "stop",
                 text_max_length: int | None = None, spans: Spans | None = None,
                 say: Callable[..., None] | None = None) -> None:  # fmt: skip
        """`read_workers` 0: a thread of this process reads. `on_corrupt: skip`: see train/feed/pieces.py."""
        self.num_micros = accumulation(global_batch, micro_batch, world)
        self.num_skipped, self.num_cut = 0, 0
        """Samples that were damaged, and such whose text was cut to text_max_length, as often as they came."""
        self._order, self._contract = order, shards.contract
        self._global_batch, self._micro_batch, self._rank, self._world = global_batch, micro_batch, rank, world
        self._say = say or (lambda event, **facts: None)
        self._text_rows = min(text_max_length or shards.contract.text_length, shards.contract.text_length)
        self._spans = spans
        self._said: set[tuple[str, int]] = set()
        self._ahead: deque[Ahead] = deque()
        self._in_hand: Ahead | None = None
        self._free: dict[Size, list[tuple[Tray, ...]]] = {}
        self._num_ahead, self._num_submitted, self._last_asked = 1, 0, math.inf
        options = Options(text_rows=self._text_rows, on_corrupt=on_corrupt, library=shards.library, spans=spans)
        self._reader: PartReader = (
            Ring(shards.path, read_workers, options, self._say, deadline_s=deadline_s)
            if read_workers
            else ThreadReader(shards, options, deadline_s=deadline_s)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Step]:
        while True:
            asked = time.monotonic()
            self._let_go()
            while self._wants_more():
                self._submit(self._order.next_batch(self._global_batch))
            self._in_hand = self._ahead.popleft()
            step = self._finish(self._in_hand)
            has_waited = time.monotonic() - asked > 0.1 * (asked - self._last_asked)
            self._num_ahead, self._last_asked = 1 if has_waited else min(self._num_ahead + 1, MOST_AHEAD), asked
            yield step

    def close(self) -> None:
        self._reader.close()

    def _wants_more(self) -> bool:
        """One step ahead at every rank alike; further ones at its own pace, and in epochs that are frozen."""
        num_ahead = len(self._ahead)
        return num_ahead <= 1 or (num_ahead <= self._num_ahead and self._order.is_known(self._global_batch))

    def _let_go(self) -> None:
        """The memory of the last step; what was used last is used first."""
        if self._in_hand:
            self._free[self._in_hand.size].append(self._in_hand.trays)
        self._in_hand = None

    def _submit(self, batch: Batch) -> None:
        mine = batch.for_rank(self._rank, self._world)
        free = self._free.setdefault(batch.size, [])
        trays = free.pop() if free else self._new_trays(batch.size)
        parts = []
        for number, tray in enumerate(trays):
            samples = mine[number * self._micro_batch : (number + 1) * self._micro_batch]
            tray.slot.ask_for(samples.rows)
            parts.append(Part(batch=self._num_submitted, slot=tray.slot, samples=samples))
            self._reader.submit(parts[-1])
        self._ahead.append(Ahead(size=batch.size, trays=trays, parts=tuple(parts), samples=batch.samples,
                                 epoch=batch.epoch, cursor=self._order.cursor))  # fmt: skip
        self._num_submitted += 1

    def _finish(self, ahead: Ahead) -> Step:
        micros = []
        for tray, part in zip(ahead.trays, ahead.parts, strict=True):
            filled = self._reader.wait(part)
            if filled.skipped or filled.num_cut:
                self._count(part, filled)
            micros.append(tray.micro(filled.num_texts, filled.longest))
        return Step(micros=tuple(micros), samples=ahead.samples, epoch=ahead.epoch, cursor=ahead.cursor)

    def _new_trays(self, size: Size) -> tuple[Tray, ...]:
        plan = SlotPlan(contract=self._contract, size=size, num_samples=self._micro_batch,
                        text_rows=self._text_rows, spans=self._spans)  # fmt: skip
        return tuple(Tray(self._reader.slot(plan)) for _ in range(self.num_micros))

    def _count(self, part: Part, filled: Filled) -> None:
        """Counted whenever it happens; said once for a record, and once for all cut texts."""
        if filled.num_cut and not self.num_cut:
            self._say("texts longer than the student takes are cut", rows=self._text_rows, batch=part.batch)
        self.num_cut += filled.num_cut
        for row, why in filled.skipped:
            self.num_skipped += 1
            sample = part.samples[row]
            if (sample.receipt.item, sample.record) not in self._said:
                self._said.add((sample.receipt.item, sample.record))
                self._say("skipped a damaged sample", sample=sample.id, why=why, total=self.num_skipped)


def accumulation(global_batch: int, micro_batch: int, world: int) -> int:
    """Forwards per optimizer step and rank; a global batch that does not divide is refused with the nearest."""
    unit = micro_batch * world
    if global_batch % unit:
        below = max(unit, global_batch // unit * unit)
        raise BadUsage(
            wrong=f"global_batch {global_batch} does not divide by batch_size {micro_batch} x {world} processes",
            found=f"{global_batch / unit:.2f} forwards",
            mend=f"set global_batch to {below} or {below + unit} (a run that has begun keeps its own: take another "
            "batch_size or number of processes)",
        )
    return global_batch // unit
