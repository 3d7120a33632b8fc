"""What the optimizers do to a student's weights."""

import torch

from common.config import check
from train.config import TrainConfig
from train.muon import Muon
from train.optim import make_optimizers
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


def test_muon_is_the_librarys_own() -> None:
    """Several shapes, wide and tall, of which some are alike; over a few steps, within what bfloat16 leaves open."""
    torch.manual_seed(0)
    mine = [torch.randn(shape).requires_grad_() for shape in ((24, 24), (24, 40), (40, 24), (24, 24), (144, 24))]
    theirs = [matrix.detach().clone().requires_grad_() for matrix in mine]
    options = {"lr": RATE, "momentum": 0.9, "weight_decay": 0.1}
    pair = (Muon(mine, **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options))
    for _ in range(4):
        first = [matrix.detach().clone() for matrix in mine]
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in pair:
            optimizer.step()
        for one, other, before in zip(mine, theirs, first, strict=True):
            assert (one - other).norm() < 0.02 * (one - before).norm()
