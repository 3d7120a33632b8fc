"""What a run shows of its student while it trains: how far it is from its teacher, and pictures. Rank 0 alone looks.

    onlooker = Onlooker(config, shards, objective, world, steps_per_epoch=...)
    onlooker.measure(state, log)            the held-out gap of the moving average, beside the untrained student's
    onlooker.draw(state, log)               epoch_NNNN_sample_MM.png: the student's picture, then its teacher's

It draws no random number and changes no weight: a run that is watched is the run.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.func import functional_call

from common.log import Log
from common.record import Record
from common.shards import ShardSet
from train.chosen import first_records, held_out_records, records_of_prompts
from train.config import TrainConfig
from train.dist import World
from train.guidance import Answer, said
from train.held_out import BATCH, Gap, HeldOut, shown
from train.objective import Objective
from train.run_folder import SAMPLES
from train.sample import GAP, pairs
from train.start import first_student
from train.state import TrainState

NUM_HELD_OUT, NUM_SAMPLES = 32, 8
"""Records."""


class Onlooker:
    """Opened at the start, so that a wish that cannot be met is refused then."""

    def __init__(self, config: TrainConfig, shards: ShardSet, objective: Objective, world: World, *,
                 steps_per_epoch: float) -> None:  # fmt: skip
        self._config, self._shards, self._objective, self._world = config, shards, objective, world
        self._steps_per_epoch = steps_per_epoch
        self._is_lead = world.rank == 0
        self._untrained: Gap | None = None
        self._held_out: HeldOut | None = None
        self._to_draw: Sequence[Record] = ()
        if self._is_lead and config.save_samples:
            prompts = config.sample_prompts
            self._to_draw = records_of_prompts(shards, prompts) if prompts else first_records(shards, NUM_SAMPLES)

    def measure(self, state: TrainState, log: Log) -> None:
        if not self._is_lead:
            return
        rows = state.student.config.text_max_length
        if self._held_out is None:
            records = held_out_records(self._shards, NUM_HELD_OUT)
            self._held_out = HeldOut(self._objective, records, text_rows=rows, device=self._world.device,
                                     batch=min(BATCH, self._config.batch_size))  # fmt: skip
            if records:
                self._untrained = self._held_out.gap(first_student(self._config).to(self._world.device).eval())
        if self._untrained is None:  # the set holds no held-out prompt yet
            return
        numbers = self._held_out.gap(averaged(state, self._world.device)).numbers()
        untrained = self._untrained.numbers()["gap"]
        log.metric(event="held_out", step=state.step, points=self._held_out.num_points, **numbers,
                   untrained_gap=untrained)  # fmt: skip
        log.say("held-out gap to the teacher (1: no better than the mean)", gap=shown(numbers["gap"]),
                untrained=shown(untrained))  # fmt: skip

    def wants_pictures(self, step: int, *, last: bool) -> bool:
        interval = self._config.sample_interval * self._steps_per_epoch
        return bool(self._to_draw) and (last or int(step / interval) > int((step - 1) / interval))

    def draw(self, state: TrainState, log: Log) -> None:
        folder = self._config.sample_dir or self._config.out / SAMPLES
        folder.mkdir(parents=True, exist_ok=True)
        answer = said(averaged(state, self._world.device), self._objective.drawn, None)
        mine, theirs = pairs(self._shards, answer, self._to_draw,
                             self._objective.grid(None), text_rows=state.student.config.text_max_length,
                             device=self._world.device)  # fmt: skip
        epoch = round(state.step / self._steps_per_epoch)
        for number, (picture, teachers) in enumerate(zip(mine, theirs, strict=True)):
            both = Image.fromarray(side_by_side(picture, teachers))
            both.save(folder / f"epoch_{epoch:04d}_sample_{number:02d}.png")
        log.say(f"{len(mine)} pictures of epoch {epoch}, each beside its teacher's", folder=folder)


def averaged(state: TrainState, device: torch.device) -> Answer:
    """The student with the moving average's weights; the student itself is left as it is."""
    weights = {name: tensor.to(device) for name, tensor in state.ema.items()}

    def answer(*inputs: Tensor) -> Tensor:
        out = functional_call(state.student, weights, inputs)
        assert isinstance(out, Tensor)
        return out

    return answer


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[H, W, 3] each."""
    return np.concatenate([left, np.full((left.shape[0], GAP, 3), 255, np.uint8), right], axis=1)
