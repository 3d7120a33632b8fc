"""How far a worker is: a bar on a terminal, else one plain line an item, and one a minute where items take longer.

with Progress(num_records, num_items, log) as progress:
    progress.moved(item)                    after each forward
    progress.committed(item, 32, 0)         from the thread that writes
"""

import time
from types import TracebackType
from typing import Self

from common.bar import Bar
from common.log import Log, human_seconds
from harvest.plan import WorkItem

SILENT_S = 60.0


class Progress:
    """Of one worker's own share; what it does for others comes on top."""

    def __init__(self, num_records: int, num_items: int, log: Log, *, alone: bool = True) -> None:
        """`alone`: nobody else draws on this terminal."""
        self.num_added = 0
        self._num_records, self._num_items, self._log = num_records, num_items, log
        self._num_done, self._num_bad, self._num_forwards = 0, 0, 0
        self._began = self._said_at = time.monotonic()
        self._bar = Bar(num_records, alone=alone)

    def moved(self, item: WorkItem) -> None:
        self._num_forwards += 1
        if not self._bar.is_shown and time.monotonic() - self._said_at > SILENT_S:
            self._said_at = time.monotonic()
            facts = {"forwards": self._num_forwards, "added": self.num_added, "left": self._left()}
            self._log.say(f"working on item {self._num_done + 1}/{self._num_items} {item.id}", **facts)

    def committed(self, item: WorkItem, num_good: int, num_bad: int) -> None:
        self.num_added += num_good
        self._num_bad += num_bad
        self._num_done += 1
        self._said_at = time.monotonic()
        spent = self._said_at - self._began
        rate = f"{self.num_added / spent:.1f}/s"
        event = f"item {self._num_done}/{max(self._num_items, self._num_done)} {item.id} committed"
        self._log.say(event, records=num_good, rate=rate, left=self._left())
        self._log.metric(
            item=item.id, records=self.num_added, quarantined=self._num_bad, forwards=self._num_forwards,
            seconds=round(spent, 3),
        )  # fmt: skip
        self._bar.moved(self.num_added + self._num_bad)

    def _left(self) -> str:
        """From the records done; before the first ones nobody knows."""
        done = self.num_added + self._num_bad
        if not done:
            return "unknown"
        return human_seconds((time.monotonic() - self._began) / done * max(self._num_records - done, 0))

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)
