"""What saving and resuming ask of the host beside the state itself: no file of a checkpoint is ever whole in memory."""

import math
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import check
from common.log import Log
from train.config import TrainConfig
from train.dist import HOST, KILOBYTES, World
from train.optim import update_ema
from train.run_folder import EMA_NAME, checkpoints
from train.start import new_state
from train.state import Keep, TrainState, restore, snapshot_of, write_checkpoint
from train.student.network import StudentConfig, WanLite

STUDENT = {"num_layers": 2, "num_heads": 4, "head_dim": 32, "in_channels": 4, "out_channels": 4, "patch": 2,
           "text_dim": 8, "ffn_dim": 256}  # fmt: skip
LARGE = STUDENT | {"num_layers": 10, "head_dim": 96, "ffn_dim": 1024}


def state_of(student: dict[str, Any], *, rank: int = 0, steps: int = 1) -> TrainState:
    config = check(TrainConfig, {"set": "s", "init": "i", "out": "o", "muon": {"lr": 4e-3}}, source="test")
    torch.manual_seed(0)
    state = new_state(WanLite(StudentConfig(**student)), config, World(rank=rank, size=rank + 1, device=HOST))
    for _ in range(steps):
        for parameter in state.student.parameters():
            parameter.grad = torch.randn_like(parameter)
        for optimizer in state.optimizers:
            optimizer.step()
        state.student.zero_grad()
        update_ema(state.ema, state.student, 0, 0.9)
    return state


def facts(state: TrainState) -> dict[str, Any]:
    return {"student": state.student.config.to_dict()}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTES


def written_and_read(run: Path) -> tuple[int, int, int]:
    """The process's largest size before, after the save, after the resume."""
    torch.set_num_threads(1)
    state = state_of(LARGE)
    snapshot = snapshot_of(state, facts(state))
    before = peak()
    write_checkpoint(run, snapshot, Keep(newest=1))
    written = peak()
    restore(run, state, Log("test", quiet=True))
    return before, written, peak()


def test_beside_the_state_a_checkpoint_is_written_and_read_a_tensor_at_a_time(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        before, written, resumed = fresh.submit(written_and_read, tmp_path).result(timeout=120)
    (folder,) = checkpoints(tmp_path)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size > 1e8
    assert written - before < 0.1 * size and resumed - before < 0.1 * size, [
        f"{part / 1e6:.0f} MB" for part in (size, before, written, resumed)
    ]


def test_only_the_first_rank_keeps_an_average_and_any_rank_resumes_from_it(tmp_path: Path) -> None:
    first, other = state_of(STUDENT), state_of(STUDENT, rank=1)
    assert not other.ema and other.weights().keys() == first.weights().keys() == first.ema.keys()
    write_checkpoint(tmp_path, snapshot_of(first, facts(first)), Keep(newest=1))
    for rank in (0, 1):
        resumed = state_of(STUDENT, rank=rank, steps=0)
        restore(tmp_path, resumed, Log("test", quiet=True))
        same = snapshot_of(resumed, {}).tensors
        for name, tensors in snapshot_of(first, {}).tensors.items():
            expected = {} if rank and name == EMA_NAME else tensors
            assert same[name].keys() == expected.keys()
            assert all(torch.equal(same[name][key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0)])
def test_tensors_of_any_shape_come_back(shape: tuple[int, ...], tmp_path: Path) -> None:
    """As our own reader and as safetensors' has them."""
    from safetensors.torch import load_file

    from common.files import write_atomic
    from train.student.weights import safetensors_stream, tensors_of

    tensor = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    write_atomic(tmp_path / "x", safetensors_stream({"x": shape}, [("x", tensor)], {}))
    for found in (dict(tensors_of(tmp_path / "x")), load_file(tmp_path / "x")):
        assert found["x"].shape == shape and torch.equal(found["x"], tensor)
