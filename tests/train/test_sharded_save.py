"""What saving a sharded optimizer asks of the ranks: the bits of a whole one, one parameter at a time, no pickle."""

from typing import Any

import pytest
import torch
import torch.distributed

from common.config import check
from tests.train.ranks import together
from train.config import TrainConfig
from train.optim import full_state, gather, make_optimizers
from train.student.network import StudentConfig, WanLite

SMALL = StudentConfig(num_layers=2, num_heads=2, head_dim=12, in_channels=4, out_channels=4, patch=2, text_dim=8,
                      ffn_dim=40)  # fmt: skip
STEPS = (0, 2)


def stepped(steps: int, *, num_ranks: int) -> tuple[WanLite, list[torch.optim.Optimizer]]:
    """The same on every rank."""
    config = check(TrainConfig, {"set": "s", "init": "i", "out": "o", "muon": {"lr": 4e-3},
                                 "sharded_optimizer": True}, source="test")  # fmt: skip
    torch.manual_seed(0)
    student = WanLite(SMALL)
    optimizers = make_optimizers(student, config, num_ranks=num_ranks)
    for _ in range(steps):
        for parameter in student.parameters():
            parameter.grad = torch.randn_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
    return student, optimizers


def saves(rank: int, size: int) -> list[tuple[dict[str, Any], list[int]]]:
    """What the first rank has, and the bytes of each message, after each number of steps."""
    told = []
    for steps in STEPS:
        student, optimizers = stepped(steps, num_ranks=size)
        kept = {}
        with pytest.MonkeyPatch.context() as patch:
            sent = watched(patch)
            if rank == 0:
                kept = {name: value.numpy().copy() for name, value in full_state(student, optimizers)}
            else:
                gather(student, optimizers)
        told.append((kept, sent))
    return told


def watched(patch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each message from now on; a pickle is refused."""
    real, sent = torch.distributed.broadcast, []

    def broadcast(tensor: torch.Tensor, **where: Any) -> Any:
        sent.append(tensor.nbytes)
        return real(tensor, **where)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle")

    patch.setattr(torch.distributed, "broadcast", broadcast)
    for name in ("save", "load"):
        patch.setattr(torch, name, refused)
    return sent


def test_the_first_rank_has_the_bits_of_a_whole_optimizer_one_parameter_at_a_time() -> None:
    """AdamW and Muon on three ranks; also before there has been a step."""
    answers = together(3, saves, 3)
    for number, steps in enumerate(STEPS):
        student, whole = stepped(steps, num_ranks=1)
        expected = {name: value.numpy() for name, value in full_state(student, whole)}
        kept, _ = answers[0][number]
        assert kept.keys() == expected.keys() and bool(kept) == (steps > 0)
        for name, value in expected.items():
            assert kept[name].tobytes() == value.tobytes() and kept[name].shape == value.shape, name
        largest = max(parameter.nbytes for parameter in student.parameters())
        total = sum(value.nbytes for value in expected.values())
        for answer in answers:
            _, sent = answer[number]
            assert sum(sent) == total and max(sent, default=0) <= largest
