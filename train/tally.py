"""What happened since the last line of the log, over all ranks.

    asked = tally.add(taken, step, stop.asked)      one message a step: sums of the loss, and whether anyone was asked
    numbers = tally.take()                          for metrics.jsonl; and a new account is begun

The sums live in the TrainState, so that a resumed run writes the lines that an uninterrupted one would have written.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from train.dist import World
from train.feed.data import Step
from train.loss import NUM_LEVELS
from train.state import TrainState
from train.step import Taken


class Tally:
    """Times and sums between two lines."""

    def __init__(self, world: World, state: TrainState) -> None:
        self._world, self._state = world, state
        self._first_id = ""
        self._last: Taken | None = None
        self._restart_clock()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def add(self, taken: Taken, step: Step, asked: bool) -> bool:
        """Whether any rank was asked to stop."""
        flag = torch.tensor([float(asked)], dtype=torch.float64, device=taken.sums.device)
        told = self._world.summed(torch.cat([taken.sums.flatten(), flag])).tolist()
        self._state.level_sums = [mine + new for mine, new in zip(self._state.level_sums, told[:-1], strict=True)]
        self._num_steps += 1
        self._num_samples += len(step.samples)
        self._last, self._first_id = taken, step.samples[0].id
        return bool(told[-1] > 0)

    def take(self) -> dict[str, Any]:
        assert self._last is not None
        sums, counts = self._state.level_sums[:NUM_LEVELS], self._state.level_sums[NUM_LEVELS:]
        spent = max(time.monotonic() - self._began, 1e-9)
        numbers = {
            "loss": sum(sums) / sum(counts) if sum(counts) else None,
            "loss_by_level": [total / count if count else None for total, count in zip(sums, counts, strict=True)],
            "lr": self._last.rate,
            "grad_norm": float(self._last.norm),
            "first_sample": self._first_id,
            "skipped_steps": len(self._state.skipped),
            "data_wait": self._waited / spent,
            "steps_per_s": self._num_steps / spent,
            "samples_per_s": self._num_samples / spent,
            **self._world.memory(),
        }
        self._state.level_sums = [0.0] * (2 * NUM_LEVELS)
        self._restart_clock()
        return numbers

    def _restart_clock(self) -> None:
        self._began, self._waited, self._num_steps, self._num_samples = time.monotonic(), 0.0, 0, 0
