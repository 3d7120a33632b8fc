"""What a terminal is shown of a harvest, and what a file is told instead."""

import io

import pytest

from common.log import Log
from harvest.plan import WorkItem
from harvest.running.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("place", "alone", "is_drawn"), [
    (Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False),
])  # fmt: skip
def test_a_bar_is_drawn_where_one_looks_alone_and_lines_are_said_everywhere(
    place: type[io.StringIO], alone: bool, is_drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = place()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr("harvest.running.progress.SILENT_S", -1.0)
    item = WorkItem(height=64, width=64, questions=())
    with Progress(8, 2, Log("harvest"), alone=alone) as progress:
        progress.moved(item)
        progress.committed(item, 4, 0)
        progress.committed(item, 3, 1)
    told = shown.getvalue()
    assert told.count("committed records=") == 2 and progress.num_added == 7
    assert ("━" in told and "m8/8\x1b" in told) == is_drawn
    assert ("working on item 1/2" in told) != is_drawn
