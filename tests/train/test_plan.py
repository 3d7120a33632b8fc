"""The plan's memory is what autograd keeps, and its mends are named when it does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import check
from train.config import TrainConfig
from train.plan import activation_bytes, memory, plan_lines
from train.student.network import StudentConfig, WanLite

LITE = {"num_layers": 4, "num_heads": 4, "head_dim": 64, "in_channels": 16, "out_channels": 16, "patch": 2,
        "text_dim": 64, "ffn_dim": 1024}  # fmt: skip


def config(**changes: Any) -> TrainConfig:
    return check(TrainConfig, {"set": "s", "init": "i", "out": "o"} | changes, source="test")


def kept_by_autograd(student: WanLite, batch: int, side: int) -> int:
    """Bytes that a backward pass needs, each storage once, without the weights themselves."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = student(torch.randn(batch, 16, side // 8, side // 8), torch.full((batch,), 500.0),
                      torch.randn(batch, 32, 64), torch.full((batch,), 32))  # fmt: skip
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("batch", "side"), [(2, 256), (4, 128)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_activations_are_what_the_backward_pass_keeps(batch: int, side: int, checkpointing: bool) -> None:
    student_config = StudentConfig(**LITE)
    student = WanLite(student_config, gradient_checkpointing=checkpointing)
    planned = activation_bytes(config(batch_size=batch, gradient_checkpointing=checkpointing), student_config,
                               (side, side))  # fmt: skip
    kept = kept_by_autograd(student, batch, side)
    if checkpointing:  # one block's own come and go during the backward pass
        assert kept < planned < activation_bytes(config(batch_size=batch), student_config, (side, side))
    else:
        assert 0.75 < planned / kept < 1.33, f"planned {planned:.3g}, kept {kept:.3g}"


def test_memory_counts_what_each_key_moves() -> None:
    student = StudentConfig(**LITE)
    plain, hosted = (memory(config(ema_on_host=on_host), student, 1000, (256, 256), num_gpus=1)
                     for on_host in (False, True))  # fmt: skip
    assert plain.total - hosted.total == 4000
    sharded = config(sharded_optimizer=True)
    alone, together = (memory(sharded, student, 1000, (256, 256), num_gpus=num) for num in (1, 4))
    assert alone.total - together.total == 6000


def test_what_does_not_fit_is_told_what_would(micro_set: Path, micro_init: Path, tmp_path: Path) -> None:
    asked = config(set=micro_set, init=micro_init, out=tmp_path)
    fits = "\n".join(plan_lines(asked, num_gpus=1, gpu_bytes=24e9, samples_per_s=100.0))
    assert "it fits" in fits and "72 samples an epoch" in fits and "at 100 samples/s: 7.4s" in fits
    tight = "\n".join(plan_lines(asked, num_gpus=1, gpu_bytes=5e6, samples_per_s=None))
    assert "does not fit" in tight and "gradient_checkpointing" in tight and "fits" in tight.split("what does:")[1]
    assert "unknown before a rate is measured" in tight
