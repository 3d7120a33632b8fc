"""A micro-batch on its way from the set into a slot, and the thread that reads it in this process. No torch.

reader = ThreadReader(shards, Options(text_rows=77, on_corrupt="stop"), deadline_s=300)     or ring.py's Ring: processes
slot = reader.slot(plan)                              once; used again and again
slot.ask_for(samples.rows)
part = Part(batch=17, slot=slot, samples=samples)
reader.submit(part)                                   returns at once
filled = reader.wait(part)                            the slot holds it; what went wrong is raised here
"""

import mmap
import queue
import threading
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from common.errors import Partial
from common.shards import ShardSet
from train.feed.filling import Filler, Options
from train.feed.order import Samples
from train.feed.pieces import ALONE, Filled, Piece, finished
from train.feed.slots import Slot, SlotPlan

NOT_BEGUN = -1
"""A reader's progress before its first row."""


@dataclass(slots=True, kw_only=True, eq=False)
class Part:
    """One micro-batch, requested in its slot; it is filled when it has an outcome."""

    batch: int
    slot: Slot
    samples: Samples
    pieces: list[Piece] = field(default_factory=list)
    """Of those who fill it together, as they come."""
    outcome: Filled | Exception | None = None
    deaths: dict[int, int] = field(default_factory=dict)
    """Of processes that were reading it, by their number."""

    def result(self) -> Filled:
        assert self.outcome is not None
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def at(self, row: int) -> str:
        """What a reader is doing that has come to `row`."""
        sample = self.samples[max(row, 0)]
        name = f"item {sample.receipt.item}, record number {sample.record}, point {sample.point}"
        return f"starting, to read {name}" if row == NOT_BEGUN else f"reading {name}"


class PartReader(Protocol):
    def slot(self, plan: SlotPlan) -> Slot: ...

    def submit(self, part: Part) -> None: ...

    def wait(self, part: Part) -> Filled: ...

    def close(self) -> None: ...


class ThreadReader:
    """Fills parts in the order in which they come."""

    def __init__(self, shards: ShardSet, options: Options, *, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._filler = Filler(shards, options)
        self._progress = np.full(1, NOT_BEGUN, np.int64)
        self._asked: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[Part] = queue.SimpleQueue()
        self._closed = False
        threading.Thread(target=self._run, name="feed", daemon=True).start()

    def slot(self, plan: SlotPlan) -> Slot:
        memory = mmap.mmap(-1, plan.num_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # its first touch is a third of the first batch otherwise
            memory.madvise(mmap.MADV_HUGEPAGE)
        return Slot(plan, memory)

    def submit(self, part: Part) -> None:
        self._asked.put(part)

    def wait(self, part: Part) -> Filled:
        try:
            answered = self._answered.get(timeout=self._deadline_s)
        except queue.Empty:
            raise late("the reading thread", part, int(self._progress[0]), self._deadline_s) from None
        assert answered is part, "parts are waited for in the order in which they were submitted"
        return part.result()

    def close(self) -> None:
        self._closed = True
        self._asked.put(None)

    def _run(self) -> None:
        while (part := self._asked.get()) is not None and not self._closed:
            try:
                part.outcome = finished(part.slot, [self._filler.fill(part.slot, self._progress, ALONE)])
            except Exception as error:  # whatever it is, who waits for the part raises it
                part.outcome = error
            self._answered.put(part)


def late(who: str, part: Part, row: int, deadline_s: float) -> Partial:
    return Partial(
        wrong=f"{who} has not filled batch {part.batch} for {deadline_s:.0f} s",
        found=part.at(row),
        mend="look at the disk that holds the set, or raise deadline_s; then run again",
    )
