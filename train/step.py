"""One optimizer step: what changes the weights, and nothing that waits, logs or saves.

    stepper = Stepper(config, world, state, objective, weights, total_steps)
    taken = stepper.take(step)              the state is one step further

    micro-batches: forward, loss, backward -> gradients averaged over ranks -> clipped -> optimizer -> moving average

A step whose gradient is not finite changes no weight: NaN and Inf survive the average over ranks, so all of them see
it and skip alike, without a word between them.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import Partial
from train.config import TrainConfig
from train.dist import World
from train.feed.data import Micro, Step
from train.loss import NUM_LEVELS, error_of, level_sums, levels_of
from train.objective import Objective
from train.optim import PEAK, learning_rate, update_ema
from train.state import TrainState

MAX_SKIPPED, SKIPPED_OF = 10, 100
"""So many skipped steps among the last so many end the run."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a step leaves behind for those who watch."""

    sums: Tensor  # [2, NUM_LEVELS] float64, of this rank
    norm: Tensor
    """Of the gradient, before clipping."""
    rate: float
    skipped: bool
    suspects: tuple[int, ...]
    """Of a skipped step: which samples of this rank had a loss that is not finite."""


class Stepper:
    """The student with its optimizer, ready to take steps."""

    def __init__(self, config: TrainConfig, world: World, state: TrainState, objective: Objective,
                 weights: Tensor | None, total_steps: int) -> None:  # fmt: skip
        self._config, self._world, self._state, self._objective = config, world, state, objective
        self._weights = None if weights is None else weights.to(world.device)
        self._total_steps = total_steps
        forward: Any = torch.compile(state.student) if config.compile else state.student
        self._gradients = world.flat_gradients(state.student)
        if world.size > 1 and not self._gradients:
            lend_gradients(state.student)
        self._student: nn.Module = world.wrap(forward)
        self._is_bucketed = isinstance(self._student, nn.parallel.DistributedDataParallel)

    def take(self, step: Step) -> Taken:
        state = self._state
        rate = self._set_rates()
        self._forget_gradients()
        sums = torch.zeros(2, NUM_LEVELS, dtype=torch.float64, device=self._world.device)
        errors = []
        for number, (host_micro, w) in enumerate(zip(step.micros, self._guidance(step), strict=True)):
            micro = host_micro.to(self._world.device)
            is_last = number == len(step.micros) - 1
            with contextlib.nullcontext() if is_last else self._without_sync():
                errors.append(self.backward(micro, w, share=1 / len(step.micros)))
            sums += level_sums(micro.sigmas, errors[-1])
        if self._gradients:
            self._gradients.average()
        norm, skipped = self._descend()
        state.step += 1
        state.samples_seen += len(step.samples)
        state.cursor, state.epoch = step.cursor, step.epoch
        suspects: tuple[int, ...] = ()
        if skipped:
            suspects = tuple((~torch.cat(errors).isfinite()).nonzero().flatten().tolist())
            sums.zero_()
        return Taken(sums=sums, norm=norm, rate=rate, skipped=skipped, suspects=suspects)

    def _set_rates(self) -> float:
        """Each group its share of its own peak; the answer is AdamW's."""

        def now(peak: float) -> float:
            return learning_rate(self._state.step, self._total_steps, self._config, peak)

        for group in (group for optimizer in self._state.optimizers for group in optimizer.param_groups):
            group["lr"] = now(group[PEAK])
        return now(self._config.lr)

    def _guidance(self, step: Step) -> Sequence[Tensor | None]:
        """w of each micro-batch, where it is drawn: by the samples' positions in the stream of all ranks."""
        drawn = self._objective.drawn
        if drawn is None:
            return [None] * len(step.micros)
        of_all = drawn.at(self._state.samples_seen, len(step.samples)).to(self._world.device)
        return of_all[self._world.rank :: self._world.size].split([len(micro.sigmas) for micro in step.micros])

    def backward(self, micro: Micro, w: Tensor | None = None, *, share: float) -> Tensor:
        """Gradients of one micro-batch; its errors, [B]."""
        with self._autocast():
            per_sample = error_of(self._student, self._objective.ask(micro, w), micro)
        weighted = per_sample if self._weights is None else per_sample * self._weights[levels_of(micro.sigmas)]
        self._state.scaler.scale(weighted.mean() * share).backward()
        return per_sample.detach()

    def rehearse(self, micro: Micro) -> None:
        """All that a micro-batch costs, and nothing of it stays."""
        with self._without_sync():
            self.backward(micro.to(self._world.device), share=1.0)
        self._forget_gradients()

    def _descend(self) -> tuple[Tensor, bool]:
        """The gradient's norm, and whether the step was skipped."""
        state, config = self._state, self._config
        for optimizer in state.optimizers:
            state.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(state.student.parameters(), config.max_grad_norm)
        skipped = not bool(norm.isfinite())
        if not skipped:
            for optimizer in state.optimizers:
                state.scaler.step(optimizer)
            update_ema(state.ema, state.student, state.step, config.ema_decay)
        elif not state.scaler.is_enabled() or state.scaler.get_scale() <= 1:  # else the scale was too large, and falls
            state.skipped.append(state.step)
        state.scaler.update()
        return norm, skipped

    def _forget_gradients(self) -> None:
        student = self._state.student
        if self._gradients:
            self._gradients.zero()
        elif self._is_bucketed:  # without them the next ones would grow beside the buckets until they are sent
            torch._foreach_zero_([each.grad for each in student.parameters() if each.grad is not None])
        else:
            student.zero_grad(set_to_none=True)

    def _without_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Gradients cross the network once per optimizer step."""
        return self._student.no_sync() if self._is_bucketed else contextlib.nullcontext()  # type: ignore[operator]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._config.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._world.device.type, dtype=DTYPES[self._config.precision])


def lend_gradients(student: nn.Module) -> None:
    """Zeros without memory of their own: DistributedDataParallel puts the gradients that are there when it begins into
    its buckets, and there they stay."""
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand_as(parameter)


def require_progress(state: TrainState, ids: list[str]) -> None:
    """End a run that skips too much, by a fault that names the last samples."""
    recent = [step for step in state.skipped if step >= state.step - SKIPPED_OF]
    if len(recent) >= MAX_SKIPPED:
        raise Partial(
            wrong=f"{len(recent)} of the last {min(SKIPPED_OF, state.step)} steps had no finite gradient",
            found=f"the last with {', '.join(ids) or 'finite losses'}",
            mend="at the very start: look at the init; else export a sound older checkpoint (`python -m train export "
            "CHECKPOINT --format wanlite`) as the init of a new run with a lower lr, or precision: bfloat16 or float32",
        )
