"""How processes come together, and how one leaves by a fault: at once, and heard."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from common.config import check
from common.errors import BadUsage
from common.log import Log
from common.stop import StopRequest
from tests.made import ROOT
from train.config import TrainConfig
from train.dist import _place
from train.out_of_memory import survived

TWO = """
import os, sys, time
import torch
from common.cli import LazyGroup
from common.errors import Corrupt, Stopped
from train.dist import joined
# NCCL's farewell waits for the others, who wait in a collective.
torch.distributed.destroy_process_group = lambda: time.sleep(600 if os.environ["RANK"] == "1" else 0)
main = LazyGroup(name="train", commands={})

def work(*args, **kwargs):
    with joined("cpu", timeout_s=60) as world:
        world.summed(torch.ones(1))
        if world.rank == 1:
            raise FAULT
        world.summed(torch.ones(1))

import click
click.Group.main = work
main.main()
"""
CORRUPT = 'Corrupt(wrong="a shard is damaged", found="this", mend="that")'


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [(CORRUPT, 5, "a shard is damaged; found: this"), ("ZeroDivisionError('our mistake')", 1, "our mistake")],
)
def test_a_process_that_fails_is_heard_and_ends_while_the_others_wait(fault: str, code: int, told: str) -> None:
    port = str(20000 + os.getpid() % 20000)
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [sys.executable, "-c", TWO.replace("FAULT", fault)]
    started = [
        subprocess.Popen(words, cwd=ROOT, env=common | {"RANK": rank}, stderr=stderr, text=True)
        for rank, stderr in (("0", subprocess.DEVNULL), ("1", subprocess.PIPE))
    ]
    try:
        _, said = started[1].communicate(timeout=60)
        assert started[1].returncode == code and told in said
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_task_that_sees_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun --gpus-per-task=1: the third task of a node has one GPU, and it is number 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadUsage, match="process 3 of this node has no GPU"):
        _place("auto", 3)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert _place("auto", 3) == _place("cuda", 3) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert _place("auto", 3) == torch.device("cuda", 3) and _place("cuda:1", 3) == torch.device("cuda", 1)
    assert _place("cpu", 3) == torch.device("cpu")


def test_a_device_that_cannot_be_is_refused_by_the_config() -> None:
    said = {"set": "a", "init": "b", "out": "c"}
    for device in ("gpu", "cuda:x", "cuda1"):
        with pytest.raises(BadUsage, match="device"):
            check(TrainConfig, said | {"device": device}, source="here")
    assert check(TrainConfig, said | {"device": "cuda:3"}, source="here").device == "cuda:3"


@pytest.mark.parametrize(
    "words",
    ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling", "can't allocate memory: 9 bytes"],
)
def test_a_look_without_room_is_left_out_and_the_run_goes_on(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with survived("pictures", Log("train"), set()):
        raise RuntimeError(words + "\nmore")
    assert "pictures left out: out of memory" in (told := "".join(capsys.readouterr())) and words in told
    with pytest.raises(RuntimeError, match="shape"), survived("pictures", Log("train"), set()):
        raise RuntimeError("shape mismatch")


def test_a_lost_terminal_asks_to_stop_but_not_under_nohup() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.asked and "SIGHUP" in str(stop.fault())
    assert signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)
