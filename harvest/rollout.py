"""One item's walk from noise to pictures, and what is kept of it.

    records = rollout(teacher, item, contract, micro_batch=4, moved=watch.moved)

    noise of each record's own seed -> per expert, per micro-batch: the solver walks its part of the grid
        at each step   fed = scale x state, rounded to latent_dtype;  cond, uncond = teacher(fed, t)
                       guided = uncond + w (cond - uncond);  state = solver(state, guided)
        at kept steps  fed, cond, uncond go into the record          (source: trajectory)
                       with branches: guided, fed and guided: the very numbers that the solver gets
    -> final = the end point; everything in float32: the set's encoding rounds it
    -> at kept steps   fed = the end point under fresh noise, the teacher asked again      (source: renoise)
    source: images         the end point is a picture's latent; there is no walk

The whole item goes through the high-noise expert first, then through the other: one change of experts an item.
Every state is rounded before the teacher sees it, kept or not, so keeping a step never changes the path.

Where an expert is split over GPUs, `teacher.in_flight` micro-batches are walked side by side, a step of each in turn:

    GPU 0   a1 b1 a2 b2 a3 ...        nothing in a step waits for a device, so the launches run ahead of the GPUs, and
    GPU 1      a1 b1 a2 b2 a3         each has the next micro-batch waiting when it has done with one
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from common.record import GUIDED, Array, Contract, Record
from common.schedule import Grid, contract_grid, expert_of, kept_steps, renoise_noise, seeded_noise
from harvest.copies import Copies
from harvest.loading.transfer import sent
from harvest.plan import Question, WorkItem
from harvest.solvers import Solver, Step, solver_of
from harvest.teacher import Teacher

DONE = object()


@dataclass(slots=True, kw_only=True)
class Walker:
    """One record on its way."""

    question: Question
    text: Tensor  # [L, D] float32, rounded to its stored dtype
    grid: Grid
    experts: Array  # [steps]
    kept: Array  # [K]
    state: Tensor  # [C, H, W] float32
    copies: Copies
    points: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """On the host, once the copies are settled."""

    def keep(self, step: int, row: int, fields: Mapping[str, Tensor]) -> None:
        taken = self.copies.take(*(field[row] for field in fields.values()))
        self.points[step] = dict(zip(fields, taken, strict=True))

    def record(self, item: WorkItem) -> Record:
        points = [self.points[int(step)] for step in self.kept]
        fields: dict[str, Any] = {name: np.stack([point[name].numpy() for point in points]) for name in points[0]}
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
            final=self.state.cpu().numpy(),
            **fields,
        )


@dataclass(slots=True, kw_only=True)
class Group:
    """A micro-batch, with the solver that it keeps over the change of experts."""

    walkers: list[Walker]
    solver: Solver


class EndPoints(Protocol):
    """See harvest/latents.py."""

    def latents(self, item: WorkItem) -> Mapping[str, Tensor]: ...


def rollout(
    teacher: Teacher,
    item: WorkItem,
    contract: Contract,
    *,
    micro_batch: int,
    moved: Callable[[], None],
    alive: Callable[[], None] | None = None,
    stage: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
    pictures: EndPoints | None = None,
) -> list[Record]:
    """Every record of an item, in its order; without those whose picture cannot be read. `moved` is called after each
    forward, `alive` (or that too) after each prompt that is encoded; either may raise to stop. `stage` is entered with
    the name of what is done: pictures, encode, denoise, copy.
    A micro-batch is put together before anything is left out: who is in it depends on the item alone."""
    rounded = getattr(torch, contract.storage_dtype.name)
    batches = [item.questions[start : start + micro_batch] for start in range(0, len(item.questions), micro_batch)]
    ends: Mapping[str, Tensor] = {}
    if pictures is not None:
        with stage("pictures"):
            teacher.make_room()
            ends = pictures.latents(item)
        batches = [tuple(question for question in batch if question.key in ends) for batch in batches]
    prompts = [question.prompt for batch in batches for question in batch]
    texts: dict[str, Tensor] = {}
    with stage("encode"):
        for prompt in dict.fromkeys([*prompts, contract.negative_prompt]):
            texts[prompt] = teacher.encode([prompt])[0].to(rounded).float()
            (alive or moved)()
    negative = texts[contract.negative_prompt]
    copies = Copies()
    groups = [
        Group(
            walkers=[_start(question, item, texts, ends, contract, copies) for question in batch],
            solver=solver_of(contract),
        )
        for batch in batches
        if batch
    ]
    walkers = [walker for group in groups for walker in group.walkers]
    experts = range(contract.num_experts())
    with stage("denoise"):
        for expert in experts if pictures is None else ():
            walks = (_walk(teacher, group, expert, negative, contract) for group in groups)
            side_by_side(walks, teacher.in_flight, moved)
        if contract.source != "trajectory":
            for expert in reversed(experts):  # the one that is loaded first
                walks = (
                    _ask_again(teacher, group.walkers, expert, negative, contract, micro_batch) for group in groups
                )
                side_by_side(walks, teacher.in_flight, moved)
    with stage("copy"):
        copies.settle()
        return [walker.record(item) for walker in walkers]


def side_by_side(walks: Iterable[Iterator[None]], width: int, moved: Callable[[], None]) -> None:
    """To their ends, a step of each in turn; `width` of them are under way at once. `moved` is called after each."""
    waiting, under_way = iter(walks), deque[Iterator[None]]()
    while True:
        if len(under_way) < width and (begun := next(waiting, None)) is not None:
            under_way.append(begun)
            continue
        if not under_way:
            return
        walk = under_way.popleft()
        if next(walk, DONE) is not DONE:
            under_way.append(walk)
            moved()


def _start(question: Question, item: WorkItem, texts: Mapping[str, Tensor], ends: Mapping[str, Tensor],
           contract: Contract, copies: Copies) -> Walker:  # fmt: skip
    """At its noise, or at its picture."""
    grid = contract_grid(contract, int(question.key, 16))
    experts = expert_of(grid.timesteps, contract.boundary, train_steps=contract.train_steps)
    side = contract.latent_stride
    shape = (contract.latent_channels, item.height // side, item.width // side)
    return Walker(
        question=question,
        text=texts[question.prompt],
        grid=grid,
        experts=experts,
        kept=kept_steps(question.key, contract.steps, contract.keep, experts, contract.keep_at),
        state=ends[question.key] if ends else torch.from_numpy(_noise(question, shape, grid)),
        copies=copies,
    )


def _noise(question: Question, shape: tuple[int, ...], grid: Grid) -> Array:
    """Where the walk begins: what the teacher is fed first is the noise itself."""
    noise = seeded_noise(question.seed, shape)
    return noise if grid.scales is None else noise / grid.scales[0]


def _walk(teacher: Teacher, group: Group, expert: int, negative: Tensor, contract: Contract) -> Iterator[None]:
    """One micro-batch through one expert's steps, one at a time."""
    walkers = group.walkers
    condition = teacher.condition([walker.text for walker in walkers], negative)
    state = sent(torch.stack([walker.state for walker in walkers]), teacher.device)  # [B, C, H, W]
    for step in _steps_of(walkers, expert):
        t = torch.from_numpy(np.stack([walker.grid.timesteps[step] for walker in walkers]))
        levels = (walker.grid.at(step) for walker in walkers)
        sigma, after, scale = (_column(values, state) for values in zip(*levels, strict=True))
        fed = (scale * state).to(getattr(torch, contract.latent_dtype)).float()
        cond, uncond = teacher.predict(fed, t, condition)
        guided = uncond + contract.guidance[expert] * (cond - uncond)
        if contract.source == "trajectory":
            said = _chosen(contract, latents=fed, cond=cond, uncond=uncond, guided=guided)
            for row, walker in enumerate(walkers):
                if step in walker.kept:
                    walker.keep(step, row, said)
        state = group.solver(Step(state=state, fed=fed, guided=guided, sigma=sigma, after=after, scale=scale,
                                  timestep=float(t[0])))  # fmt: skip
        yield
    for row, walker in enumerate(walkers):
        walker.state = state[row]


def _ask_again(teacher: Teacher, walkers: list[Walker], expert: int, negative: Tensor, contract: Contract,
               micro_batch: int) -> Iterator[None]:  # fmt: skip
    """The kept levels of one expert, at the end points under fresh noise."""
    asked = [(walker, int(step)) for walker in walkers for step in walker.kept if walker.experts[step] == expert]
    for start in range(0, len(asked), micro_batch):
        part = asked[start : start + micro_batch]
        condition = teacher.condition([walker.text for walker, _ in part], negative)
        clean = sent(torch.stack([walker.state for walker, _ in part]), teacher.device)
        noise = np.stack([renoise_noise(walker.question.key, step, tuple(clean.shape[1:])) for walker, step in part])
        levels = (walker.grid.at(step) for walker, step in part)
        sigma, _, scale = (_column(values, clean) for values in zip(*levels, strict=True))
        state = (1 - sigma) * clean + sigma * sent(torch.from_numpy(noise), teacher.device)
        fed = (scale * state).to(getattr(torch, contract.latent_dtype)).float()
        t = torch.from_numpy(np.stack([walker.grid.timesteps[step] for walker, step in part]))
        cond, uncond = teacher.predict(fed, t, condition)
        guided = uncond + contract.guidance[expert] * (cond - uncond)
        said = _chosen(contract, latents=fed, cond=cond, uncond=uncond, guided=guided)
        for row, (walker, step) in enumerate(part):
            walker.keep(step, row, said)
        yield


def _chosen(contract: Contract, **fields: Tensor) -> dict[str, Tensor]:
    """Those that the set holds. Where the branches are not kept, nobody else will see that one of them says nothing at
    all: its point is not to be used."""
    if contract.branches == GUIDED:
        silent = _says_nothing(fields["cond"]) | _says_nothing(fields["uncond"])
        fields["guided"] = fields["guided"].masked_fill(silent.view(-1, 1, 1, 1), torch.nan)
    return {name: fields[name] for name in contract.point_fields}


def _says_nothing(prediction: Tensor) -> Tensor:  # [B]
    flat = prediction.flatten(1)
    return flat.amax(1) == flat.amin(1)


def _column(values: tuple[np.float32, ...], like: Tensor) -> Tensor:
    """One number a row, to multiply a [B, C, H, W] by."""
    return sent(torch.from_numpy(np.array(values, np.float32)), str(like.device)).view(-1, 1, 1, 1)


def _steps_of(walkers: list[Walker], expert: int) -> Iterator[int]:
    """The boundary is an edge of every record's strata: all of them are on the same side at the same step."""
    for step in range(walkers[0].grid.num_steps):
        if walkers[0].experts[step] == expert:
            yield step
