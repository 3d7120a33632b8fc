"""Cut by importance, by first rows or at random: how far off each student is before it learns, and how soon it learns.

    lines = run(teacher_dir, set_path, folder, steps=300)

Before: the cut's answer against the conditional prediction of the expert that it was cut from, at the held-out points
that this expert served; 1 is no better than the mean. After: the same error against the guided prediction at all
points, measured every EVERY steps; the table says at which step it fell below what the best cut had at the end.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from common.config import check
from common.shards import ShardSet
from train.chosen import held_out_records
from train.config import TrainConfig
from train.feed.data import Feed
from train.feed.order import Order
from train.held_out import HeldOut
from train.loss import error_of
from train.objective import Output, objective_of
from train.optim import learning_rate, make_optimizers
from train.student.fresh import start_fresh
from train.student.importance import ByNorms, Importance
from train.student.network import StudentConfig, WanLite, load_student
from train.student.projection import Stripped, cut_out, importance_of, statistics_of

EVERY, BATCH, NUM_RECORDS = 40, 32, 32
EXPERT = 1
"""The low-noise one, which cuts start from."""
SIZES = {"1/2": (3 / 4, 2 / 3, 1.0), "1/4": (1 / 2, 1 / 2, 1.0), "1/8": (1 / 2, 1 / 2, 1 / 2)}
"""Of the teacher's parameters, about -> heads, ffn and depth as parts of the teacher's."""


class FirstRows(ByNorms):
    """What a slice [:n] of every tensor keeps."""

    name = "first rows"

    def blocks(self, wanted: int) -> list[int]:
        return list(range(wanted))

    def residual(self, blocks: list[int]) -> Tensor:
        return -torch.arange(self._teacher.width, dtype=torch.float32)

    def flow(self, part: str) -> Tensor:
        # The norm of a head's scores must fall from the first head on.
        return torch.arange(self._teacher.width, 0, -1, dtype=torch.float32)

    def hidden(self, writer: str, reader: str) -> Tensor:
        return -torch.arange(self._read(writer).shape[0], dtype=torch.float32)


class AtRandom(FirstRows):
    name = "random channels"

    def __init__(self, teacher: Stripped, seed: int) -> None:
        super().__init__(teacher.tensor, teacher.config)
        self._generator = torch.Generator().manual_seed(seed)

    def blocks(self, wanted: int) -> list[int]:
        return sorted(torch.randperm(self._teacher.num_layers, generator=self._generator)[:wanted].tolist())

    def residual(self, blocks: list[int]) -> Tensor:
        return torch.rand(self._teacher.width, generator=self._generator)

    def flow(self, part: str) -> Tensor:
        return torch.rand(self._teacher.width, generator=self._generator)

    def hidden(self, writer: str, reader: str) -> Tensor:
        return torch.rand(self._read(writer).shape[0], generator=self._generator)


def run(teacher_dir: Path, set_path: Path, folder: Path, *, steps: int) -> Iterator[str]:
    torch.set_num_threads(1)
    shards = ShardSet.open(set_path)
    teacher = Stripped(teacher_dir, "low")
    ways: list[Importance] = [ByNorms(teacher.tensor, teacher.config), FirstRows(teacher.tensor, teacher.config),
                              AtRandom(teacher, seed=0)]  # fmt: skip
    if statistics_of(shards):
        ways.insert(0, importance_of(teacher, statistics_of(shards)))
    yield "| size | parameters | cut by | before | after " + f"{steps} steps | steps to the best cut's 1.1 x |"
    yield "|---|---|---|---|---|---|"
    for size, parts in SIZES.items():
        student, place = smaller(teacher.config, parts), folder / size.replace("/", "-")
        curves = {}
        for way in ways:
            cut_out(teacher, student, place / way.name, way)
            curves[way.name] = measured(place / way.name, shards, steps)
        start_fresh(student, place / "fresh")
        curves["(random weights)"] = measured(place / "fresh", shards, steps)
        num = sum(value.numel() for value in load_student(place / "fresh").parameters())
        aim = 1.1 * min(curve[1][-1] for curve in curves.values())
        for name, (before, curve) in curves.items():
            reached = next((number * EVERY for number, gap in enumerate(curve, 1) if gap <= aim), None)
            told = f"{before:.3f} | {curve[-1]:.4f} | {reached or 'not reached'}"
            yield f"| {size} | {num / 1e6:.2f} M | {name} | {told} |"


def smaller(teacher: StudentConfig, parts: tuple[float, float, float]) -> StudentConfig:
    heads, ffn, depth = parts
    return dataclasses.replace(
        teacher,
        num_heads=round(teacher.num_heads * heads),
        ffn_dim=round(teacher.ffn_dim * ffn),
        num_layers=round(teacher.num_layers * depth),
    )


def measured(init: Path, shards: ShardSet, steps: int) -> tuple[float, list[float]]:
    """The gap before training, and after every EVERY steps of it."""
    student = load_student(init)
    contract = shards.contract
    records = held_out_records(shards, NUM_RECORDS)
    unguided = Output(contract=contract, guidance=(1.0,) * len(contract.guidance))
    before = HeldOut(unguided, records, text_rows=512, device=torch.device("cpu")).gap(student.eval())
    served = before.expert == EXPERT
    values = {"set": shards.path, "init": init, "out": init / "run", "lr": 2e-3, "warmup_steps": 20, "threads": 1}
    config = check(TrainConfig, values, source="bench")
    return float(before.error[served].sum() / before.floor[served].sum()), learned(student, shards, config, steps)


def learned(student: WanLite, shards: ShardSet, config: TrainConfig, steps: int) -> list[float]:
    objective = objective_of(config, shards.contract)
    held_out = HeldOut(objective, held_out_records(shards, NUM_RECORDS), text_rows=512, device=torch.device("cpu"))
    (optimizer,) = make_optimizers(student, config, num_ranks=1)
    receipts, curve = shards.manifest().receipts, []
    with Feed(shards, Order(0, lambda epoch: receipts), global_batch=BATCH, micro_batch=BATCH, rank=0, world=1) as feed:
        for number, step in zip(range(steps), feed, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(number, steps, config, config.lr)
            optimizer.zero_grad(set_to_none=True)
            error_of(student.train(), objective.ask(step.micros[0]), step.micros[0]).mean().backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            if (number + 1) % EVERY == 0:
                curve.append(held_out.gap(student.eval()).numbers()["gap"])
    return curve
