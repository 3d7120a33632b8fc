"""Checking, packing and writing of one item beside the forwards of the next.

    with Writer(finish, stage) as writer:           stage(): a deadline for whoever waits, however the block ends
        for item in ...:
            records = rollout(...)                  calls writer.check() now and then: an error ends the walk at once
            writer.put(item, records)               waits until the item before is on disk, and raises what it raised

    main thread    walk 1 | put | walk 2      | put | walk 3
    beside                |  finish(1)  |           |  finish(2)

One item at most is being finished and one being walked: memory is bounded, and items are committed in order. A walk
that is stopped leaves the item before it whole: leaving the block waits for it.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Self


class Writer:
    """One call of `finish` at a time, in order, in a thread of its own."""

    def __init__(self, finish: Callable[..., None], stage: Callable[[], AbstractContextManager[None]]) -> None:
        self._finish, self._stage = finish, stage
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._pending: Future[None] | None = None

    def put(self, *item: Any) -> None:
        self.wait()
        self._pending = self._pool.submit(self._finish, *item)

    def wait(self) -> None:
        """Until what was put is finished."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with self._stage():
                pending.result()

    def check(self) -> None:
        if self._pending is not None and self._pending.done():
            self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()
