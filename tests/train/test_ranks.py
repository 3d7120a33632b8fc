"""Several processes are one: the same samples, the same bits after a kill, whatever their number. On CPUs, by gloo."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from common.config import check
from common.errors import BadUsage
from common.shards import ShardSet
from tests.made import ROOT
from train.config import TrainConfig
from train.dist import World
from train.launch import adopt_srun, processes_to_start
from train.loop import train
from train.run_folder import EMA_NAME, MODEL_NAME, OPTIMIZER_NAME, checkpoints, read_metrics

FILES = (MODEL_NAME, EMA_NAME, OPTIMIZER_NAME)


@pytest.fixture(scope="module")
def settings(micro_set: Path, micro_init: Path) -> dict[str, Any]:
    """72 points in 6 shards: 60 steps of 12 in ten epochs."""
    return {"set": str(micro_set), "init": str(micro_init), "batch_size": 2, "global_batch": 12, "num_epochs": 10,
            "warmup_steps": 5, "checkpoint_every": 5, "log_every": 4, "threads": 1, "device": "cpu",
            "deadline_s": 60, "keep_checkpoints": 100}  # fmt: skip


def started(folder: Path, settings: dict[str, Any], **changes: Any) -> subprocess.Popen[str]:
    """In a session of its own, so that all its processes can be killed at once."""
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(settings | {"out": str(folder / "run")} | changes), encoding="utf-8")
    return subprocess.Popen([sys.executable, "-m", "train", "run", str(path)], cwd=ROOT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE,
                            start_new_session=True)  # fmt: skip


def finished(folder: Path, settings: dict[str, Any], **changes: Any) -> Path:
    process = started(folder, settings, **changes)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    return folder / "run"


def killed(folder: Path, settings: dict[str, Any], seconds: float, **changes: Any) -> None:
    """SIGKILL for all of them, `seconds` after their first own checkpoint."""
    before = len(checkpoints(folder / "run"))
    process = started(folder, settings, **changes)
    deadline = time.monotonic() + 120
    while len(checkpoints(folder / "run")) <= before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(seconds)
    assert process.poll() is None, f"it was over before it was killed: {process.communicate()[1]}"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}


def same(one: Path, other: Path) -> None:
    for name in FILES:
        assert (checkpoints(one)[-1] / name).read_bytes() == (checkpoints(other)[-1] / name).read_bytes(), name
    assert losses(one) == losses(other)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Path:
    return finished(tmp_path_factory.mktemp("pair"), settings, processes=2)


def test_two_processes_started_by_one_command_see_what_one_sees(
    tmp_path: Path, settings: dict[str, Any], pair: Path
) -> None:
    alone = check(TrainConfig, settings | {"out": tmp_path / "run"}, source="test")
    train(alone, World(rank=0, size=1, device=torch.device("cpu")))
    close(tmp_path / "run", pair)
    mine = read_metrics(pair / "ranks" / "1")
    assert {line["step"]: line["loss"] for line in mine if "loss" in line} == losses(pair), "two files, one truth"


@pytest.mark.full
def test_asked_to_stop_both_agree_and_torchrun_goes_on_to_the_same_bits(
    tmp_path: Path, settings: dict[str, Any], pair: Path
) -> None:
    process = started(tmp_path, settings, processes=2)
    while not checkpoints(tmp_path / "run") and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75 and "run the same command again" in told and "Traceback" not in told
    assert len(checkpoints(tmp_path / "run")) < len(checkpoints(pair)), "it was over before it was asked"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run([*torchrun, "train", "run", str(tmp_path / "c.yaml")], cwd=ROOT, capture_output=True,
                          text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    same(tmp_path / "run", pair)


def close(one: Path, other: Path) -> None:
    """The same samples and learning rates; losses and weights within what the order of a sum can move."""
    ids = [{line["step"]: (line["first_sample"], line["lr"]) for line in read_metrics(run) if "loss" in line}
           for run in (one, other)]  # fmt: skip
    assert ids[0] == ids[1]
    mine, theirs = losses(one), losses(other)
    np.testing.assert_allclose([mine[step] for step in theirs], list(theirs.values()), rtol=1e-4)
    here, there = (load_file(checkpoints(run)[-1] / MODEL_NAME) for run in (one, other))
    for name, tensor in here.items():
        torch.testing.assert_close(there[name], tensor, rtol=0, atol=5e-4)


@pytest.mark.full
@pytest.mark.parametrize("num", [1, 2, 3])
def test_killed_at_random_times_is_bitwise_uninterrupted(num: int, tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "straight").mkdir()
    straight = finished(tmp_path / "straight", settings, processes=num)
    rng = random.Random(num)
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        for _ in range(2):
            killed(folder, settings, rng.uniform(0, 0.3), processes=num)
        same(finished(folder, settings, processes=num), straight)


@pytest.mark.full
@pytest.mark.parametrize("after", [1, 3])
def test_what_two_began_another_number_ends(after: int, tmp_path: Path, settings: dict[str, Any], pair: Path) -> None:
    killed(tmp_path, settings, 0.0, processes=2)
    close(finished(tmp_path, settings, processes=after), pair)


@pytest.mark.full
@pytest.mark.parametrize("muon", [None, {"lr": 4e-3}])
def test_a_sharded_optimizer_is_the_same_optimizer(
    muon: dict[str, Any] | None, tmp_path: Path, settings: dict[str, Any], pair: Path
) -> None:
    """Killed sharded, resumed whole, and the other way round."""
    if muon is not None:
        settings = settings | {"muon": muon}
        (tmp_path / "whole").mkdir()
        pair = finished(tmp_path / "whole", settings, processes=2)
    killed(tmp_path, settings, 0.0, processes=2, sharded_optimizer=True)
    process = started(tmp_path, settings, processes=2)
    while len(checkpoints(tmp_path / "run")) < 4 and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    same(finished(tmp_path, settings, processes=2, sharded_optimizer=True), pair)


@pytest.mark.full
def test_three_shards_on_two_processes_give_both_the_same_number_of_steps(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    copied = tmp_path / "few"
    shutil.copytree(settings["set"], copied)
    for receipt in ShardSet.open(copied).manifest().receipts[3:]:
        ShardSet.open(copied).receipt_path(receipt.item).unlink()
    run = finished(tmp_path, settings, processes=2, set=str(copied), num_epochs=5)
    steps = [[line["step"] for line in read_metrics(folder) if "loss" in line] for folder in (run, run / "ranks" / "1")]
    assert steps[0] == steps[1] and steps[0][-1] == 36 * 5 // 12


def config(**changes: Any) -> TrainConfig:
    return check(TrainConfig, {"set": "s", "init": "i", "out": "o", "device": "cpu"} | changes, source="test")


def test_who_was_started_by_a_launcher_starts_nobody() -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert processes_to_start(config(), torchrun) == 0
    assert processes_to_start(config(processes=2), torchrun) == 0
    assert processes_to_start(config(processes=3), {}) == 3
    assert processes_to_start(config(), {}) == 1
    with pytest.raises(BadUsage, match="two launchers"):
        processes_to_start(config(processes=4), torchrun)
    with pytest.raises(BadUsage, match="MASTER_ADDR"):
        processes_to_start(config(), {"RANK": "0", "WORLD_SIZE": "2"})


def test_sruns_words_are_understood_in_its_steps_only() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
    adopted = dict(step)
    adopt_srun(adopted)
    assert (adopted["RANK"], adopted["WORLD_SIZE"], adopted["LOCAL_RANK"]) == ("3", "4", "1")
    assert processes_to_start(config(), adopted) == 0
    batch_script = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    adopt_srun(batch_script)
    assert "RANK" not in batch_script
    with pytest.raises(BadUsage, match="MASTER_ADDR"):
        adopt_srun(step | {"SLURM_STEP_NUM_NODES": "2"})


def test_checkpoints_do_not_say_how_many_wrote_them(pair: Path) -> None:
    state = json.loads((checkpoints(pair)[-1] / "state.json").read_bytes())
    assert state["samples_seen"] == 720 and "world" not in state
