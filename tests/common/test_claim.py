"""Claims and limits: one holder, named to the second; freed with its holder; a time limit is a polite request."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from common.claim import claimed
from common.cli import Duration
from common.errors import Refused, Stopped
from common.stop import StopRequest
from tests.made import ROOT


def test_a_second_holder_is_told_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lock.json"
    with claimed(path, "the run"), pytest.raises(Refused, match=rf"process {os.getpid()} on .* since 20"), claimed(
        path, "the run"
    ):  # fmt: skip
        pass
    with claimed(path, "the run"):
        pass


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from common.claim import claimed\n"
    code += "with claimed(Path(sys.argv[1]), 'x'): print('held', flush=True); time.sleep(60)"
    path = tmp_path / "lock.json"
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(Refused, match=f"process {holder.pid} "), claimed(path, "x"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with claimed(path, "x"):
        pass


def test_a_time_limit_asks_to_stop() -> None:
    with StopRequest(limit_s=0) as stop:
        assert stop.asked
        with pytest.raises(Stopped, match="time limit of"):
            stop.check()
    with StopRequest(limit_s=60) as stop:
        assert not stop.asked


@pytest.mark.parametrize(("told", "seconds"), [("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("90s", 90), ("7", 7)])
def test_times_as_people_write_them(told: str, seconds: float) -> None:
    assert Duration().convert(told, None, None) == seconds


@pytest.mark.parametrize("told", ["", "soon", "3x", "m", "-1"])
def test_what_is_no_time_is_refused(told: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a time"):
        Duration().convert(told, None, None)


WAITING = """
import time
from common.stop import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    for _ in range(600):
        time.sleep(0.01)
    print("asked" if stop.asked else "not asked", flush=True)
"""


@pytest.mark.parametrize(("pause", "obeyed"), [(0.05, False), (1.3, True)])
def test_a_second_signal_is_obeyed_at_once_but_not_an_echo(pause: float, obeyed: bool) -> None:
    """Slurm tells every process of a job, and our launcher passes on what it hears: that is one wish, not two."""
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(pause)
        process.send_signal(signal.SIGTERM)
        if obeyed:
            assert process.wait(timeout=2) == -signal.SIGTERM
        else:
            assert process.stdout.readline() == "asked\n" and process.wait() == 0
