"""A student without a teacher's weights: for sets whose teacher is no Wan, and as the baseline that a cut must beat.

report = start_fresh(student, out_dir)             config.json, report.json, model.safetensors, as `project` leaves
"""

import json
from pathlib import Path
from typing import cast

import torch

from common.seals import replace
from train.student.network import Block, StudentConfig, WanLite, remove_weights, save_student
from train.student.projection import REPORT_NAME, Report, TensorReport

SEED = 0


def start_fresh(student: StudentConfig, out_dir: Path) -> Report:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = WanLite(student)
    begin_as_identity(model)
    weights = model.state_dict()
    tensors = [
        TensorReport(name=name, kind="fresh", source="", teacher_shape=(), shape=tuple(tensor.shape))
        for name, tensor in weights.items()
    ]
    report = Report(
        teacher={}, student=student.to_dict(), experts="none", chosen_by="nothing", blocks=[], tensors=tensors
    )
    remove_weights(out_dir)
    replace(out_dir, REPORT_NAME, (json.dumps(report.to_dict(), indent=2) + "\n").encode())
    save_student(out_dir, student, weights, made_by="train init --fresh")
    return report


@torch.no_grad()
def begin_as_identity(model: WanLite) -> None:
    """Each block adds nothing at first and the whole predicts zero, as in DiT (Peebles & Xie 2212.09748, 3.2)."""
    for block in model.blocks:
        assert isinstance(block, Block)
        block.scale_shift_table[:, [2, 5]] = 0
        torch.nn.init.zeros_(cast(torch.nn.Linear, block.attn2.to_out[0]).weight)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    torch.nn.init.zeros_(model.condition_embedder.time_proj.weight)
    torch.nn.init.zeros_(model.condition_embedder.time_proj.bias)
