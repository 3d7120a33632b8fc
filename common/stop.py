"""Stopping on request: SIGTERM, SIGINT and SIGHUP (a terminal that is gone; not under nohup) ask once, politely; a
second one is obeyed at once. A time limit asks too.

stop = StopRequest(limit_s=1800)
if stop.asked: ...; raise stop.fault()      or stop.check() where nothing has to be put away first
"""

import signal
import time
from types import FrameType
from typing import Any, Self

from common.errors import Stopped
from common.log import human_seconds

ECHO_S = 1.0
"""Within it a signal is the first one's echo: a scheduler tells a whole process group, and a launcher passes it on."""


class StopRequest:
    """The signals are ours while it is entered, in the main thread."""

    def __init__(self, limit_s: float | None = None) -> None:
        self._limit_s, self._began = limit_s, time.monotonic()
        self._signal: int | None = None
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        return self._signal is not None or self._out_of_time

    @property
    def _out_of_time(self) -> bool:
        return self._limit_s is not None and time.monotonic() - self._began > self._limit_s

    def fault(self) -> Stopped:
        if self._signal is not None:
            why = signal.Signals(self._signal).name
        elif self._limit_s is not None and self._out_of_time:
            why = f"the time limit of {human_seconds(self._limit_s)}"
        else:
            why = "asked by another process"
        return Stopped(wrong="stopped on request", found=why, mend="run the same command again: it goes on from here")

    def check(self) -> None:
        if self.asked:
            raise self.fault()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._asked_at = number, now
        elif now - self._asked_at > ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
