"""What a review found that would have lost a night, each held by a test."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import Corrupt, Refused
from common.log import Log
from common.shards import ShardSet
from common.watch import HEARTBEAT_NAME, Watch
from tests.made import write_student_json
from tests.train.test_export import trained
from train.feed.epochs import Epochs
from train.launch import _wait
from train.run_folder import METRICS_NAME, checkpoints, read_metrics
from train.student.config import read_student_json
from train.student.projection import project


@pytest.fixture(scope="module")
def settings(micro_set: Path, micro_init: Path) -> dict[str, Any]:
    return {"set_path": micro_set, "init": micro_init}


def spoil(folder: Path) -> None:
    (folder / "state.json").write_bytes(b"{}")


def test_checkpoints_that_cannot_be_read_are_no_new_beginning(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = trained(tmp_path, **settings, num_epochs=0.4, checkpoint_every=2)
    before = checkpoints(run)
    for folder in before:
        spoil(folder)
    with pytest.raises(Corrupt, match=r"no checkpoint of .* can be read"):
        trained(tmp_path, **settings, num_epochs=0.4, checkpoint_every=2)
    assert checkpoints(run) == before, "tomorrow the disk may be well again"


def test_a_newer_checkpoint_that_is_damaged_pushes_no_whole_one_out(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = trained(tmp_path, **settings, num_epochs=0.5, checkpoint_every=1, keep_checkpoints=1)
    (last,) = checkpoints(run)
    spoiled = last.with_name("000000999999")
    last.rename(spoiled)
    spoil(spoiled)
    (run / "epochs").mkdir(exist_ok=True)
    with pytest.raises(Corrupt):
        trained(tmp_path, **settings, num_epochs=0.5, checkpoint_every=1, keep_checkpoints=1)
    from train.state import Keep, Snapshot, write_checkpoint

    for samples in (8, 16):
        snapshot = Snapshot(samples_seen=samples, tensors={}, summary={"step": samples})
        written = write_checkpoint(run, snapshot, Keep(newest=1))
        assert checkpoints(run) == [written, spoiled]


def test_another_student_under_the_same_run_is_refused(
    tmp_path: Path, settings: dict[str, Any], micro_wan: Path
) -> None:
    trained(tmp_path, **settings)
    other = read_student_json(write_student_json(tmp_path / "s.json", depth=1))
    project(micro_wan, other, tmp_path / "other", experts="low")
    with pytest.raises(Refused, match="num_layers 2, now 1"):
        trained(tmp_path, set_path=settings["set_path"], init=tmp_path / "other")


def child(seconds: float, code: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", f"import time, sys; time.sleep({seconds}); sys.exit({code})"])


def test_a_dead_rank_is_noticed_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.launch.GRACE_S", 0.5)
    began = time.monotonic()
    assert _wait([child(30, 0), child(0.1, 5)]) == 5
    assert time.monotonic() - began < 10


def test_a_rank_that_stopped_on_request_lets_the_others_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.launch.GRACE_S", 0.2)
    assert _wait([child(1.0, 75), child(0.1, 75)]) == 75


def test_who_waits_for_shards_hears_the_wish_to_stop(tmp_path: Path, micro_set: Path) -> None:
    shards = ShardSet.open(micro_set)
    epochs = Epochs(shards, tmp_path, rank=0, follow_s=60, stopping=lambda: True)
    epochs.freeze(0)
    began = time.monotonic()
    assert len(epochs.freeze(1)) == len(shards.manifest().receipts)
    assert time.monotonic() - began < 5


def test_a_heartbeat_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    """And leaves no temporary name behind."""
    (tmp_path / HEARTBEAT_NAME).mkdir()
    with Watch(tmp_path, Log("test", quiet=True), interval_s=0.02) as watch, watch.stage("step", deadline_s=60):
        time.sleep(0.1)
    assert sorted(os.listdir(tmp_path)) == [HEARTBEAT_NAME]


def test_a_torn_line_of_metrics_hides_no_other(tmp_path: Path) -> None:
    (tmp_path / METRICS_NAME).write_bytes(b'{"step": 1}\n{"step": 2, "lo{"step": 3}\n{"step": 4}\n{"st')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 4]
