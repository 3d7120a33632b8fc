"""A disk that will be full one night is told of before the first step."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from common.config import check
from common.errors import Partial, Stopped
from common.tensor_file import read_header
from tests.made import trained_here
from train.check import check as check_all
from train.config import TrainConfig
from train.dist import World
from train.plan import plan_lines
from train.room import bytes_each, num_milestones
from train.run_folder import checkpoints
from train.start import new_state, open_student

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


class Disk(NamedTuple):
    total: int
    free: int


@pytest.fixture
def settings(tmp_path: Path, micro_set: Path, micro_init: Path) -> dict[str, Any]:
    """18 steps, a save every third."""
    return {"set": micro_set, "init": micro_init, "out": tmp_path / "run", "batch_size": 12, "num_epochs": 3,
            "checkpoint_every": 3, "keep_checkpoints": 2, "threads": 1, "device": "cpu"}  # fmt: skip


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> Any:
    """Leaves so many checkpoints' room on the disk, from now on."""

    def leave(num: float) -> None:
        free = int(num * size_of(settings))
        monkeypatch.setattr("train.room.shutil.disk_usage", lambda _: Disk(total=10**12, free=free))

    return leave


def size_of(settings: dict[str, Any]) -> int:
    from common.shards import ShardSet

    config = check(TrainConfig, settings, source="test")
    student = open_student(config, ShardSet.open(config.set).contract)
    return bytes_each(config, new_state(student, config, ALONE))


@pytest.mark.parametrize("changes", [{}, {"muon": {"lr": 4e-3}}, {"lora": {"rank": 8}}, {"frozen": ["blocks.0."]}])
def test_a_checkpoint_is_as_large_as_was_told(changes: dict[str, Any], settings: dict[str, Any]) -> None:
    settings |= changes
    (folder,) = checkpoints(trained_here(settings, num_epochs=0.1))
    stored = [each for path in folder.glob("*.safetensors") for each in read_header(path).values()]
    steps = sum(each.num_bytes for each in stored if each.name.endswith(":step"))
    assert sum(each.num_bytes for each in stored) - steps == size_of(settings) > 1000 * steps


def test_room_for_the_first_saves_alone_is_refused_before_them(settings: dict[str, Any], room: Any) -> None:
    room(2.9)
    with pytest.raises(Partial, match="3 more checkpoints") as fault:
        trained_here(settings)
    assert "keep_checkpoints: 2" in fault.value.found and not checkpoints(settings["out"])
    with pytest.raises(Partial, match="no space"):
        check_all(check(TrainConfig, settings, source="test"), ALONE)
    room(3.1)
    with pytest.raises(Stopped):
        trained_here(settings, limit_s=0.0)
    room(1.9)
    with pytest.raises(Partial, match="2 more checkpoints"):
        trained_here(settings)
    room(2.1)
    assert len(checkpoints(trained_here(settings))) == 2
    room(0)
    trained_here(settings)  # nothing is left to save


def test_a_short_run_wants_no_more_than_it_writes(settings: dict[str, Any], room: Any) -> None:
    room(1.1)
    assert len(checkpoints(trained_here(settings, num_epochs=0.5))) == 1


def test_what_is_kept_for_ever_is_told_of_and_does_not_count_as_going(settings: dict[str, Any], room: Any) -> None:
    settings |= {"keep_every": 2, "keep_checkpoints": 1}
    config = check(TrainConfig, settings, source="test")
    assert [num_milestones(config, step, 18) for step in (0, 5, 6, 18)] == [3, 3, 2, 0], "steps 6, 12 and 18"
    room(4.9)
    out = trained_here(settings)
    assert "3 checkpoints are kept for ever" in (out / "log.txt").read_text()
    assert [int(folder.name) // 12 for folder in checkpoints(out)] == [6, 12, 18]
    settings |= {"keep_every": 1, "out": out.parent / "all"}
    with pytest.raises(Stopped):
        trained_here(settings, limit_s=0.0)
    assert len(checkpoints(settings["out"])) == 1
    room(1.9)
    with pytest.raises(Partial, match="2 more checkpoints"):
        trained_here(settings)


def test_the_plan_tells_of_the_disk(settings: dict[str, Any]) -> None:
    asked = check(TrainConfig, settings, source="test")
    told = "\n".join(plan_lines(asked, num_gpus=1, gpu_bytes=24e9, samples_per_s=None))
    assert "on the disk: 3 checkpoints of " in told
