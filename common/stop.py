"""Stopping on request: SIGTERM and SIGINT ask once, politely; a second one is obeyed at once.

stop = StopRequest()
if stop.asked: ...; raise stop.fault()      or stop.check() where nothing has to be put away first
"""

import signal
from types import FrameType
from typing import Any, Self

from common.errors import Stopped


class StopRequest:
    """The two signals are ours while it is entered, in the main thread."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        return self._signal is not None

    def fault(self) -> Stopped:
        name = signal.Signals(self._signal).name if self._signal is not None else "asked by another process"
        return Stopped(wrong="stopped on request", found=name, mend="run the same command again: it goes on from here")

    def check(self) -> None:
        if self.asked:
            raise self.fault()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        signal.signal(number, signal.SIG_DFL)
