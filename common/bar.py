"""A bar on a terminal; elsewhere nothing is drawn, and whoever draws it says plain lines instead.

with Bar(total) as bar:
    bar.moved(done)             bar.is_shown: whether anybody sees it
"""

import sys
from types import TracebackType
from typing import Any, Self


class Bar:
    """On stderr, below the lines that are said meanwhile."""

    def __init__(self, total: int, *, done: int = 0, alone: bool = True) -> None:
        """`done`: by an earlier start. `alone`: nobody else draws on this terminal."""
        self._bar = _drawn(total, done) if alone and sys.stderr.isatty() else None

    @property
    def is_shown(self) -> bool:
        return self._bar is not None

    def moved(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _drawn(total: int, done: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    bar.add_task("", total=total, completed=done)
    return bar
