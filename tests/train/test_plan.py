"""The plan's memory is what autograd keeps, and its mends are named when it does not fit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import check
from train.config import TrainConfig
from train.optim import make_optimizers, moments_to_come, own_slots
from train.plan import activation_bytes, memory, moments, plan_lines, trained
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


def total(asked: TrainConfig, *, trained: int = 1000, num_gpus: int = 1) -> float:
    return memory(asked, student=StudentConfig(**LITE), num_parameters=1000, num_trained=trained,
                  num_moments=2 * trained, side=(256, 256), num_gpus=num_gpus).total  # fmt: skip


def test_memory_counts_what_each_key_moves() -> None:
    assert total(config()) - total(config(ema_on_host=True)) == 4000
    sharded = config(sharded_optimizer=True)
    assert total(sharded) - total(sharded, num_gpus=4) == 6000
    assert total(config()) - total(config(), trained=400) == 600 * (4 + 8), "frozen: no gradient, no moments"


def counted(asked: TrainConfig, shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, trained(asked, shapes).values()))


def test_what_is_trained_is_counted_as_it_is() -> None:
    """Against the student itself, with peft's own adapters beside it."""
    student = WanLite(StudentConfig(**LITE))
    shapes = {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}
    whole = sum(parameter.numel() for parameter in student.parameters())
    assert counted(config(), shapes) == whole
    held = sum(parameter.numel() for name, parameter in student.named_parameters() if name.startswith("blocks.0."))
    assert counted(config(frozen=["blocks.0."]), shapes) == whole - held
    pytest.importorskip("peft")
    from train.lora import adapt

    asked = config(lora={"rank": 3, "targets": ["to_q", "to_out.0", "net.2"]})
    assert asked.lora is not None
    adapt(student, asked.lora, seed=0)
    adapters = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    assert counted(asked, shapes) == adapters > 0


@pytest.mark.parametrize("changes", [{}, {"muon": {"lr": 4e-3}}, {"muon": {"lr": 4e-3}, "frozen": ["blocks.0."]}])
def test_the_planned_optimizer_is_the_one_that_a_step_makes(changes: dict[str, Any]) -> None:
    asked = config(**changes)
    student = WanLite(StudentConfig(**LITE))
    shapes = {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not name.startswith(asked.frozen))
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizers = make_optimizers(student, asked, num_ranks=1)
    to_come = sum(parameter.numel() for parameter in moments_to_come(optimizers))
    for optimizer in optimizers:
        optimizer.step()
    made = sum(slot.numel() for slots in own_slots(optimizers).values() for slot in slots.values() if slot.ndim)
    assert moments(asked, trained(asked, shapes)) == to_come == made
    assert not [*moments_to_come(optimizers)]


def test_what_does_not_fit_is_told_what_would(micro_set: Path, micro_init: Path, tmp_path: Path) -> None:
    asked = config(set=micro_set, init=micro_init, out=tmp_path)
    fits = "\n".join(plan_lines(asked, num_gpus=1, gpu_bytes=24e9, samples_per_s=100.0))
    assert "it fits" in fits and "72 samples an epoch" in fits and "at 100 samples/s: 7.4s" in fits
    tight = "\n".join(plan_lines(asked, num_gpus=1, gpu_bytes=5e6, samples_per_s=None))
    assert "does not fit" in tight and "gradient_checkpointing" in tight and "fits" in tight.split("what does:")[1]
    assert "unknown before a rate is measured" in tight
