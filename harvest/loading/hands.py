"""Threads that move bytes. A read that never comes back keeps neither who waits for it nor the process from ending.

hands = Hands(4, "bytes")
future = hands.submit(read, path)           as with an executor; hands.map too
result = patiently(future, heed)            `heed` is called meanwhile, and may raise to stop
hands.leave()                               what is not begun never begins; what moves may end its piece
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

TICK_S = 0.1
GRACE_S = 1.0
T = TypeVar("T")
S = TypeVar("S")
Task = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Hands:
    """Daemon threads with one queue; an executor's own would be waited for when the process ends."""

    def __init__(self, count: int, name: str) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[..., T], *arguments: Any) -> "Future[T]":
        future: Future[T] = Future()
        self._tasks.put((future, work, arguments))
        return future

    def map(self, work: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """In the order of the items."""
        waiting = [self.submit(work, item) for item in items]
        try:
            for future in waiting:
                yield future.result()
        finally:
            for future in waiting:
                future.cancel()

    def finish(self) -> None:
        """What was submitted is done, and then they go home; nobody waits."""
        for _ in self._threads:
            self._tasks.put(None)

    def leave(self) -> None:
        """At once, but for a piece that is under way and moves."""
        try:
            while True:
                if task := self._tasks.get_nowait():
                    task[0].cancel()
        except Empty:
            self.finish()
        deadline = time.monotonic() + GRACE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, work, arguments = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(*arguments))
                except BaseException as error:  # whoever asks for the result gets it
                    future.set_exception(error)
            del task, future, work, arguments  # else they live until the next one comes


def patiently(future: "Future[T]", heed: Callable[[], object], *, every_s: float = TICK_S) -> T:
    """Its result, or what `heed` raises meanwhile."""
    # Not `result(timeout)`: it raises what a task's own TimeoutError looks like.
    while not wait([future], every_s).done:
        heed()
    return future.result()
