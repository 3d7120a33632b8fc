"""The heartbeat: says the stage, names a stall, knows the dead."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.log import Log, gpu_label, human_bytes, human_seconds
from common.watch import HEARTBEAT_NAME, STACKS_NAME, Watch, read_heartbeat
from tests.made import ROOT


def test_a_stage_that_does_not_move_is_named_with_its_stack(tmp_path: Path) -> None:
    log = Log("test", tmp_path, quiet=True)
    with Watch(tmp_path, log, interval_s=0.02) as watch, watch.stage("copy", deadline_s=0.1):
        assert (read_heartbeat(tmp_path) or {})["state"] == "starting(copy)"
        watch.moved(bytes_read=7)
        time.sleep(0.4)
        assert (read_heartbeat(tmp_path) or {})["state"] == "stalled(copy)"
        watch.moved()
        watch.running()
        assert (read_heartbeat(tmp_path) or {})["state"] == "running"
    assert "test_a_stage_that_does_not_move" in (tmp_path / STACKS_NAME).read_text()
    assert "STALLED in 'copy'" in (tmp_path / "log.txt").read_text()
    assert (read_heartbeat(tmp_path) or {})["state"] == "done"


def test_a_stall_that_cannot_be_told_does_not_end_the_heartbeat(tmp_path: Path) -> None:
    log = Log("test", tmp_path / "log", quiet=True)
    (tmp_path / "log").rmdir()
    with Watch(tmp_path / "run", log, interval_s=0.02) as watch, watch.stage("copy", deadline_s=0.05):
        time.sleep(0.2)
        watch.moved(bytes_read=7)
        time.sleep(0.04)
        assert (read_heartbeat(tmp_path / "run") or {})["bytes_read"] == 7


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="boom"), Watch(tmp_path, Log("test", quiet=True)):
        raise ValueError("boom")
    beat = read_heartbeat(tmp_path) or {}
    assert beat["state"] == "stopped" and "boom" in beat["why"]


def test_a_killed_process_is_seen_to_be_dead(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from common.watch import Watch; from common.log import Log\n"
    code += "watch = Watch(Path(sys.argv[1]), Log('x')); watch.running(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 20
    while (read_heartbeat(tmp_path) or {}).get("state") != "running":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert (read_heartbeat(tmp_path) or {})["state"] == "dead(in start)"


def test_no_heartbeat_is_no_run(tmp_path: Path) -> None:
    assert read_heartbeat(tmp_path) is None
    (tmp_path / HEARTBEAT_NAME).write_text("{")
    assert read_heartbeat(tmp_path) is None


def test_numbers_go_to_metrics_and_lines_to_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log("harvest", tmp_path)
    log.say("item committed", records=3)
    log.metric(step=1, loss=0.5)
    assert "harvest item committed records=3" in capsys.readouterr().err
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5


def test_people_read_these() -> None:
    assert gpu_label(index=0, uuid="GPU-1234567890", rank=3) == "gpu0[12345678] rank3"
    assert [human_bytes(n) for n in (5, 1500, 2_000_000, 3.2e12)] == ["5 B", "1.5 kB", "2.0 MB", "3.20 TB"]
    assert [human_seconds(s) for s in (2.34, 75, 7260)] == ["2.3s", "1m15s", "2h01m"]
