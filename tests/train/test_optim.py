"""What the optimizers do to a student's weights."""

from pathlib import Path

import pytest
import torch

from common.config import check
from common.log import Log
from common.stop import StopRequest
from train.config import TrainConfig
from train.dist import World
from train.loop import set_up
from train.muon import Muon
from train.optim import make_optimizers
from train.step import Stepper
from train.student.network import StudentConfig, WanLite

SMALL = StudentConfig(num_layers=2, num_heads=2, head_dim=12, in_channels=4, out_channels=4, patch=2, text_dim=8,
                      ffn_dim=40)  # fmt: skip
RATE = 1e-2


def test_muon_moves_every_direction_of_the_matrices_inside_alike_and_leaves_the_rest_to_adamw() -> None:
    """Also those that carry a tenth of the gradient of others."""
    config = check(TrainConfig, {"set": "s", "init": "i", "out": "o", "weight_decay": 0.0, "lr": 1e-3,
                                 "muon": {"lr": RATE}}, source="test")  # fmt: skip
    torch.manual_seed(0)
    student = WanLite(SMALL)
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    for parameter in student.parameters():
        rows = parameter.detach().view(len(parameter), -1)
        left, _, right = torch.linalg.svd(torch.randn_like(rows), full_matrices=False)
        parameter.grad = (left * torch.linspace(1, 0.1, left.shape[1]) @ right).view_as(parameter)
    for optimizer in make_optimizers(student, config, num_ranks=1):
        optimizer.step()
    by_muon = 0
    for name, parameter in student.named_parameters():
        step = parameter.detach() - before[name]
        if parameter.ndim == 2 and name != "proj_out.weight":
            by_muon += 1
            lengths = torch.linalg.svdvals(step) / (RATE * 0.2 * max(step.shape) ** 0.5)
            assert lengths.min() > 0.5 and lengths.max() < 1.4, name
        else:
            torch.testing.assert_close(step.abs(), torch.full_like(step, 1e-3), rtol=1e-2, atol=1e-6)
    assert by_muon == 2 * (4 + 4 + 2) + 5, "of two blocks, the timestep and the text"


@pytest.mark.parametrize("side_by_side", [1, 2 * 24 * 24, 1 << 24])
def test_muon_is_the_librarys_own(side_by_side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shapes, wide and tall, of which some are alike, and one without a gradient; over a few steps, within
    what bfloat16 leaves open; however many go side by side."""
    monkeypatch.setattr("train.muon.SIDE_BY_SIDE", side_by_side)
    torch.manual_seed(0)
    shapes = ((24, 24), (24, 40), (40, 24), (24, 24), (144, 24), (24, 24), (24, 24))
    mine = [torch.randn(shape).requires_grad_() for shape in shapes]
    theirs = [matrix.detach().clone().requires_grad_() for matrix in mine]
    options = {"lr": RATE, "momentum": 0.9, "weight_decay": 0.1}
    pair = (Muon(mine, **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options))
    for _ in range(4):
        first = [matrix.detach().clone() for matrix in mine]
        for one, other in zip(mine[:-1], theirs[:-1], strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in pair:
            optimizer.step()
        for one, other, before in zip(mine[:-1], theirs[:-1], first[:-1], strict=True):
            assert (one - other).norm() < 0.02 * (one - before).norm()
        assert torch.equal(mine[-1], first[-1])


def test_each_group_climbs_to_its_own_peak(micro_set: Path, micro_init: Path, tmp_path: Path) -> None:
    values = {"set": micro_set, "init": micro_init, "out": tmp_path, "device": "cpu", "warmup_steps": 2, "lr": 1e-3,
              "muon": {"lr": 5e-3}, "lr_schedule": "constant", "num_epochs": 1}  # fmt: skip
    run = set_up(check(TrainConfig, values, source="test"), World(rank=0, size=1, device=torch.device("cpu")),
                 Log("test", quiet=True), StopRequest(None), follow_s=0.0)  # fmt: skip
    stepper = Stepper(run.config, run.world, run.state, run.objective, None, run.total_steps)
    feed = run.feed(Log("test", quiet=True), batch_size=32)
    try:
        for share in (0.5, 1.0):
            taken = stepper.take(next(iter(feed)))
            rates = {type(each): {group["lr"] for group in each.param_groups} for each in run.state.optimizers}
            assert rates == {torch.optim.AdamW: {share * 1e-3}, Muon: {share * 5e-3}} and taken.rate == share * 1e-3
    finally:
        feed.close()
