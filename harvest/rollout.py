"""One item's walk from noise to pictures, and what is kept of it.

    records = rollout(teacher, item, walk, progress)

    noise of each record's own seed -> per expert, per micro-batch: the solver walks its part of the grid
        at each step   fed = scale x state, rounded to latent_dtype;  cond, uncond = teacher(fed, t)
                       guided = uncond + w (cond - uncond), as a velocity;  state += (sigma_next - sigma) velocity
        at kept steps  fed, cond, uncond go into the record
    -> final = the end point; everything in float32: the set's encoding rounds it

The whole item goes through the high-noise expert first, then through the other: one change of experts an item.
Every state is rounded before the teacher sees it, kept or not, so keeping a step never changes the path.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from common.record import Array, Contract, Record
from common.schedule import Grid, contract_grid, expert_of, kept_steps, seeded_noise, to_x0_noise
from harvest.plan import Question, WorkItem
from harvest.teacher import Teacher


@dataclass(slots=True, kw_only=True)
class Walker:
    """One record on its way."""

    question: Question
    text: Tensor  # [L, D] float32, rounded to its stored dtype
    grid: Grid
    experts: Array  # [steps]
    kept: Array  # [K]
    state: Tensor  # [C, H, W] float32
    points: dict[int, list[Array]] = field(default_factory=dict)

    def record(self, item: WorkItem) -> Record:
        latents, cond, uncond = (np.stack([self.points[int(step)][i] for step in self.kept]) for i in range(3))
        return Record(
            key=self.question.key,
            prompt=self.question.prompt,
            seed=self.question.seed,
            height=item.height,
            width=item.width,
            text=self.text.numpy(),
            timesteps=self.grid.timesteps[self.kept],
            sigmas=self.grid.sigmas[:-1][self.kept],
            expert=self.experts[self.kept],
            latents=latents,
            cond=cond,
            uncond=uncond,
            final=self.state.cpu().numpy(),
        )


def rollout(
    teacher: Teacher, item: WorkItem, contract: Contract, *, micro_batch: int, moved: Callable[[], None]
) -> list[Record]:
    """Every record of an item, in its order. `moved` is called after each forward, and may raise to stop."""
    rounded = getattr(torch, contract.storage_dtype.name)
    prompts = list(dict.fromkeys(question.prompt for question in item.questions))
    texts = dict(zip(prompts, (text.to(rounded).float() for text in teacher.encode(prompts)), strict=True))
    negative = teacher.encode([contract.negative_prompt])[0].to(rounded).float()
    walkers = [_start(question, item, texts[question.prompt], contract) for question in item.questions]
    for expert in range(contract.num_experts()):
        for start in range(0, len(walkers), micro_batch):
            group = walkers[start : start + micro_batch]
            _walk(teacher, group, expert, negative, contract, moved)
    return [walker.record(item) for walker in walkers]


def _start(question: Question, item: WorkItem, text: Tensor, contract: Contract) -> Walker:
    grid = contract_grid(contract, int(question.key, 16))
    experts = expert_of(grid.timesteps, contract.boundary, train_steps=contract.train_steps)
    side = contract.latent_stride
    shape = (contract.latent_channels, item.height // side, item.width // side)
    return Walker(
        question=question,
        text=text,
        grid=grid,
        experts=experts,
        kept=kept_steps(question.key, contract.steps, contract.keep, experts, contract.keep_at),
        state=torch.from_numpy(seeded_noise(question.seed, shape)),
    )


def _walk(teacher: Teacher, group: list[Walker], expert: int, negative: Tensor, contract: Contract,
          moved: Callable[[], None]) -> None:  # fmt: skip
    """One micro-batch through one expert's steps."""
    condition = teacher.condition([walker.text for walker in group], negative)
    state = torch.stack([walker.state for walker in group]).to(teacher.device)  # [B, C, H, W]
    for step in _steps_of(group, expert):
        t = torch.from_numpy(np.stack([walker.grid.timesteps[step] for walker in group]))
        sigma, after, scale = (_column(values, state) for values in zip(*(w.grid.at(step) for w in group), strict=True))
        fed = (scale * state).to(getattr(torch, contract.latent_dtype)).float()
        cond, uncond = teacher.predict(fed, t, condition)
        for row, walker in enumerate(group):
            if step in walker.kept:
                walker.points[step] = [array[row].cpu().numpy() for array in (fed, cond, uncond)]
        guided = uncond + contract.guidance[expert] * (cond - uncond)
        if contract.prediction == "flow":
            velocity = guided
        else:
            x0, noise = to_x0_noise(contract.prediction, guided, fed, scale * (1 - sigma), scale * sigma)
            velocity = noise - x0
        state = state + (after - sigma) * velocity
        moved()
    for row, walker in enumerate(group):
        walker.state = state[row]


def _column(values: tuple[np.float32, ...], like: Tensor) -> Tensor:
    """One number a row, to multiply a [B, C, H, W] by."""
    return torch.tensor(np.array(values, np.float32), device=like.device).view(-1, 1, 1, 1)


def _steps_of(group: list[Walker], expert: int) -> Iterator[int]:
    """The boundary is an edge of every record's strata: all of them are on the same side at the same step."""
    for step in range(group[0].grid.num_steps):
        if group[0].experts[step] == expert:
            yield step
