"""How far a student's answers are from its teacher's, on prompts that it never saw.

    held_out = HeldOut(objective, records, text_rows=77, device=device)
    gap = held_out.gap(student)             Gap: the error, and what predicting the mean would leave, in groups
    gap.numbers()                           for metrics.jsonl: 1 is no better than the mean, 0 is the teacher itself

Groups are noise levels (the quarters of sigma) and experts.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.record import Contract, Record
from common.schedule import pinned_points
from train.feed.data import Micro
from train.feed.slots import FINAL, Spans
from train.guidance import Answer
from train.loss import NUM_LEVELS, error_of, levels_of
from train.objective import Objective
from train.sample import padded

BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Per point: [P] each."""

    error: np.ndarray
    floor: np.ndarray
    """Of the answer 'the mean of all answers of this noise level and expert'."""
    level: np.ndarray
    expert: np.ndarray

    def numbers(self) -> dict[str, Any]:
        levels, experts = range(NUM_LEVELS), range(int(self.expert.max()) + 1)
        return {
            "mse": float(self.error.mean()),
            "gap": self._ratio(np.ones(len(self.error), bool)),
            "gap_by_level": [self._ratio(self.level == level) for level in levels],
            "gap_by_expert": [self._ratio(self.expert == expert) for expert in experts],
        }

    def _ratio(self, chosen: np.ndarray) -> float | None:
        known = chosen & (self.floor > 0)
        return float(self.error[known].sum() / self.floor[known].sum()) if known.any() else None


def shown(share: float | None) -> str:
    """For people. None: of too few points to have a mean."""
    return "-" if share is None else f"{share:.4f}"


class HeldOut:
    """Points of records, ready to be asked about."""

    def __init__(self, objective: Objective, records: Sequence[Record], *, text_rows: int,
                 device: torch.device, batch: int = BATCH) -> None:  # fmt: skip
        self._objective, self._device = objective, device
        if objective.spans is not None:
            records = [only_pinned(record, objective.contract) for record in records]
        places = [(record, point) for record in records for point in _points(record, objective.spans)]
        self._micros = [
            micro_of(places[begin : begin + batch], objective.spans, text_rows=text_rows)
            for begin in range(0, len(places), batch)
        ]
        self.num_points = len(places)

    @torch.inference_mode()
    def gap(self, student: Answer) -> Gap:
        errors, targets, levels, experts = [], [], [], []
        for host_micro in self._micros:
            micro = host_micro.to(self._device)
            question = self._objective.ask(micro)
            errors.append(error_of(student, question, micro).cpu())
            targets.append(question.target.cpu())
            levels.append(levels_of(host_micro.sigmas))
            experts.append(host_micro.expert)
        level, expert, target = torch.cat(levels), torch.cat(experts), torch.cat(targets)
        return Gap(error=torch.cat(errors).numpy(), floor=_about_the_mean(target, level * 2 + expert).numpy(),
                   level=level.numpy(), expert=expert.numpy())  # fmt: skip


def micro_of(places: Sequence[tuple[Record, int]], spans: Spans | None, *, text_rows: int) -> Micro:
    """What the feed would have made of these points."""
    records = list({id(record): record for record, _ in places}.values())
    text, lengths = padded([record.text[:text_rows] for record in records])
    row_of = {id(record): row for row, record in enumerate(records)}

    def stacked(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(record, name)[point] for record, point in places]))

    ends: dict[str, Tensor] = {}
    if spans is not None:
        ends = _ends(places, dict(spans))
    fields = {name: stacked(name) for name in records[0].point_fields}
    return Micro(timesteps=stacked("timesteps"), sigmas=stacked("sigmas"), expert=stacked("expert").long(),
                 text=text, lengths=lengths, inverse=torch.tensor([row_of[id(record)] for record, _ in places]),
                 **fields, **ends)  # fmt: skip


def _ends(places: Sequence[tuple[Record, int]], end_of: dict[int, int]) -> dict[str, Tensor]:
    states, sigmas, timesteps = [], [], []
    for record, point in places:
        end = end_of[point]
        states.append(record.final if end == FINAL else record.latents[end])
        sigmas.append(np.float32(0) if end == FINAL else record.sigmas[end])
        timesteps.append(np.float32(0) if end == FINAL else record.timesteps[end])
    return {"end": torch.from_numpy(np.stack([state.astype(np.float32) for state in states])),
            "end_sigmas": torch.from_numpy(np.array(sigmas)),
            "end_timesteps": torch.from_numpy(np.array(timesteps))}  # fmt: skip


def only_pinned(record: Record, contract: Contract) -> Record:
    """Without the points that were drawn: what a segment's begins and ends are numbers of."""
    points = pinned_points(contract, record.key)
    if points is None:
        return record
    names = ("timesteps", "sigmas", "expert", *record.point_fields)
    return dataclasses.replace(record, **{name: getattr(record, name)[points] for name in names})


def _points(record: Record, spans: Spans | None) -> list[int]:
    return list(range(len(record.sigmas))) if spans is None else [begin for begin, _ in spans]


def _about_the_mean(targets: Tensor, group: Tensor) -> Tensor:
    """[P]: the squared distance of each target from the mean of its group; 0 where it is alone."""
    out = torch.zeros(len(targets))
    for number in group.unique():
        members = targets[group == number]
        # n / (n - 1): the mean of a few points is nearer to them than the mean of all would be.
        rest = (members - members.mean(dim=0)).square().mean(dim=(1, 2, 3))
        out[group == number] = rest * len(members) / max(1, len(members) - 1)
    return out
