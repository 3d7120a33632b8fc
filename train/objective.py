"""What a student is asked, and what it should answer. Another objective is another class here and its name below.

    objective = objective_of(config, contract)      parsed, and checked against the set
    question = objective.ask(micro, w)              what the student sees, and the velocity that it should answer
    grid = objective.grid(steps=20)                 the walk from noise to picture of a student trained so

    output     the teacher's guided prediction at each stored point: a student that walks as its teacher does; with
               guidance: {low, high} at a w that is drawn for each sample and told to the student
    segment    the mean velocity between two stored points of one record, which is all that one long step needs to know:
               a student of few steps, with the guidance inside (progressive distillation, Salimans & Ho 2202.00512,
               without its rounds, because the whole path is stored)

Whatever the teacher predicts and however it adds noise, a student is a rectified flow: it is fed (1 - sigma) x0 +
sigma noise at t = 1000 sigma and answers with noise - x0.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from common.errors import BadUsage, Refused
from common.record import GUIDED, Contract
from common.schedule import EULER, GRIDS, Grid, contract_grid, to_x0_noise, vp_levels
from train.config import GuidanceRange, TrainConfig
from train.feed.data import Micro
from train.feed.slots import Spans
from train.guidance import Drawn
from train.segments import kept_by_all, spans_of

GRID = "flow_match"
"""What the export's scheduler walks, too."""


class Question(NamedTuple):
    latents: Tensor  # [B, C, H, W]
    timesteps: Tensor  # [B] on 0..1000
    target: Tensor  # [B, C, H, W], a velocity
    guidance: Tensor | None = None  # [B], what the student is told of it; None: nothing


class Objective(Protocol):
    @property
    def contract(self) -> Contract: ...

    @property
    def spans(self) -> Spans | None:
        """Which points are asked about, and which are read with them; None: all of them, each by itself."""

    @property
    def drawn(self) -> Drawn | None:
        """How w is drawn for a student that is told of it; None: it is told nothing."""

    def ask(self, micro: Micro, w: Tensor | None = None) -> Question:
        """`w` [B], drawn; None: the one of the configuration, or the set's own."""

    def grid(self, steps: int | None) -> Grid:
        """`steps` None: as many as suit it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The teacher's guided prediction, at the point where it was made."""

    contract: Contract
    guidance: tuple[float, ...]
    drawn: Drawn | None = None
    spans: None = None

    def __post_init__(self) -> None:
        only_own = self.guidance == self.contract.guidance and self.drawn is None
        assert only_own or self.contract.branches != GUIDED, "objective_of refuses it"

    def ask(self, micro: Micro, w: Tensor | None = None) -> Question:
        if w is None:
            w = torch.tensor(self.guidance, device=micro.latents.device)[micro.expert]
        if micro.guided is not None:
            target = micro.guided.float()
        else:
            assert micro.cond is not None and micro.uncond is not None
            target = guided(micro.cond.float(), micro.uncond.float(), w)
        seen, sizes = micro.latents.float(), sizes_of(self.contract, micro.timesteps)
        if self.contract.prediction != "flow":
            sigma = _column(micro.sigmas)
            scale = 1 if sizes is None else _column(sizes)
            x0, noise = to_x0_noise(self.contract.prediction, target, seen, scale * (1 - sigma), scale * sigma)
            target = noise - x0
        told = fed(self.contract, micro)
        return Question(in_flow_coordinates(seen, sizes), told, target, w if self.drawn else None)

    def grid(self, steps: int | None) -> Grid:
        if self.contract.noise != "flow":  # its teacher's own levels: it was asked about no others
            return told_by_sigma(even_grid(dataclasses.replace(self.contract, steps=steps or self.contract.steps)))
        return GRIDS[GRID](steps or self.contract.steps, self.contract.shift, train_steps=self.contract.train_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The mean velocity from a point to the end of its segment: (x_b - x_a) / (sigma_b - sigma_a)."""

    contract: Contract
    spans: Spans
    walk: Grid
    drawn: None = None

    def ask(self, micro: Micro, w: Tensor | None = None) -> Question:
        assert w is None, "the paths were walked with the set's own"
        assert micro.end is not None and micro.end_sigmas is not None and micro.end_timesteps is not None
        sizes = sizes_of(self.contract, micro.timesteps)
        here = in_flow_coordinates(micro.latents.float(), sizes)
        # An end point (t = 0) is stored as it is.
        end_sizes = sizes_of(self.contract, micro.end_timesteps)
        if end_sizes is not None:
            end_sizes = torch.where(micro.end_sigmas == 0, torch.ones_like(end_sizes), end_sizes)
        there = in_flow_coordinates(micro.end.float(), end_sizes)
        return Question(here, fed(self.contract, micro), (there - here) / _column(micro.end_sigmas - micro.sigmas))

    def grid(self, steps: int | None) -> Grid:
        if steps not in (None, self.walk.num_steps):
            raise Refused(
                wrong=f"--steps {steps}",
                found=f"a student of {self.walk.num_steps} segments: it takes these steps and no others",
                mend="leave --steps away",
            )
        return self.walk


def objective_of(config: TrainConfig, contract: Contract) -> Objective:
    if config.objective == "segment":
        return _segment(config, contract)
    if config.segments is not None:
        raise BadUsage(wrong="segments", found=f"{config.segments} with objective: output", mend="remove it")
    if contract.branches == GUIDED and config.guidance not in (None, contract.guidance):
        raise Refused(
            wrong="guidance: another w than the set's, of which only the combination was kept",
            found=f"{_told(config.guidance)}; a set of branches: guided, at {_told(contract.guidance)}",
            mend="guidance: null, or harvest with branches: both",
        )
    if isinstance(config.guidance, GuidanceRange):
        return Output(contract=contract, guidance=contract.guidance, drawn=_drawn(config, config.guidance, contract))
    guidance = config.guidance or contract.guidance
    if len(guidance) != len(contract.guidance):
        raise BadUsage(
            wrong="guidance",
            found=f"{list(guidance)}, the set's teacher has {len(contract.guidance)} experts",
            mend="give one number per expert, or null for the set's own",
        )
    return Output(contract=contract, guidance=guidance)


def _drawn(config: TrainConfig, asked: GuidanceRange, contract: Contract) -> Drawn:
    if not all(asked.low <= w <= asked.high for w in contract.guidance):
        raise Refused(
            wrong=f"guidance: {asked.low:g} to {asked.high:g} leaves out the set's own, at which it will be measured",
            found=str(list(contract.guidance)),
            mend=f"low: {min(asked.low, *contract.guidance):g}, high: {max(asked.high, *contract.guidance):g}",
        )
    return Drawn(low=asked.low, high=asked.high, seed=config.seed, contract=contract)


def _segment(config: TrainConfig, contract: Contract) -> Segment:
    if config.guidance not in (None, contract.guidance):
        raise Refused(
            wrong="guidance: another w than the set's, with objective: segment",
            found=f"{_told(config.guidance)}, the paths were walked with {list(contract.guidance)}",
            mend="guidance: null, or harvest with the guidance that you want",
        )
    if contract.source != "trajectory":
        raise Refused(
            wrong="objective: segment wants points of one path",
            found=f"a set of source {contract.source}: its points do not lie on one",
            mend="harvest with source: trajectory, or train with objective: output",
        )
    spans = spans_of(config.segments, contract)
    even, steps = even_grid(contract), kept_by_all(contract)[[begin for begin, _ in spans]]
    walk = Grid(sigmas=np.append(even.sigmas[steps], np.float32(0)), timesteps=even.timesteps[steps])
    walk = walk if says_sigma(contract) else told_by_sigma(walk)
    return Segment(contract=contract, spans=spans, walk=walk)


def _told(guidance: tuple[float, ...] | GuidanceRange | None) -> str:
    return (
        f"{guidance.low:g} to {guidance.high:g}" if isinstance(guidance, GuidanceRange) else str(list(guidance or ()))
    )


def guided(cond: Tensor, uncond: Tensor, w: Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2207.12598, eq. 6) with each sample's w, [B]."""
    return uncond + _column(w) * (cond - uncond)


def sizes_of(contract: Contract, timesteps: Tensor) -> Tensor | None:
    """[B]: by what the teacher's state is larger than the flow's, a + b of x = a x0 + b noise; None: by nothing."""
    if contract.noise == "flow":
        return None
    return _sizes(contract.noise, contract.train_steps, timesteps.device)[timesteps.round().long()]


@functools.cache
def _sizes(process: str, train_steps: int, device: torch.device) -> Tensor:  # [train_steps]
    _, schedule, start, end = process.split()
    a, b = vp_levels(schedule, float(start), float(end), train_steps)
    return torch.from_numpy((a + b).astype(np.float32)).to(device)


def in_flow_coordinates(latents: Tensor, sizes: Tensor | None) -> Tensor:
    return latents if sizes is None else latents / _column(sizes)


def fed(contract: Contract, micro: Micro) -> Tensor:
    """The timestep that the student is told."""
    return micro.timesteps if says_sigma(contract) else micro.sigmas * 1000


def says_sigma(contract: Contract) -> bool:
    """Whether the teacher's timesteps are 1000 sigma: a folder's own solver may cut them to integers."""
    return contract.noise == "flow" and contract.solver == EULER


def even_grid(contract: Contract) -> Grid:
    """Without jitter."""
    return contract_grid(dataclasses.replace(contract, jitter=False), seed=0)


def told_by_sigma(grid: Grid) -> Grid:
    return Grid(sigmas=grid.sigmas, timesteps=grid.sigmas[:-1] * np.float32(1000))


def _column(numbers: Tensor) -> Tensor:
    return numbers.view(-1, 1, 1, 1)
