"""What a run shows of its student while it trains: how far it is from its teacher, and pictures. Rank 0 alone looks.

    onlooker = Onlooker(config, shards, objective, world, freeze=epochs.freeze, steps_per_epoch=...)
    onlooker.open(state, log)               all that looks need is read: what cannot be is refused before the first step
    onlooker.measure_untrained(state)       at step 0, while the run's own student is the untrained one
    onlooker.measure(state, log)            the held-out gap of the moving average, beside the untrained student's
    onlooker.draw(state, log)               epoch_NNNN_sample_MM.png: the student's picture, then its teacher's

It draws no random number and changes no weight: a run that is watched is the run. Afterwards a look that fails is a
line in the log (train/out_of_memory.py).
"""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.func import functional_call

from common.errors import BadUsage
from common.log import Log
from common.manifest import Receipt
from common.record import Record
from common.seals import sound
from common.shards import ASSETS, ShardSet
from train.chosen import (
    Found,
    Pardon,
    found_again,
    found_first,
    found_held_out,
    found_of_prompts,
    skipping,
    strict,
    with_held_out,
)
from train.config import TrainConfig
from train.dist import World
from train.guidance import Answer, said
from train.held_out import BATCH, HeldOut, shown
from train.objective import Objective
from train.out_of_memory import survived
from train.run_folder import SAMPLES
from train.sample import GAP, pairs
from train.start import first_student
from train.state import TrainState
from train.vae.network import load_vae, read_vae_values
from train.watched import Watched

NUM_HELD_OUT, NUM_SAMPLES = 32, 8
"""Records."""
DECODER = "AutoencoderKLWan"


class Onlooker:
    """`freeze(epoch)` gives the receipts of an epoch that has begun."""

    def __init__(self, config: TrainConfig, shards: ShardSet, objective: Objective, world: World, *,
                 freeze: Callable[[int], Sequence[Receipt]], steps_per_epoch: float) -> None:  # fmt: skip
        self._config, self._shards, self._objective, self._world = config, shards, objective, world
        self._freeze, self._steps_per_epoch = freeze, steps_per_epoch
        self._is_lead = world.rank == 0
        self._pardon: Pardon = strict
        self._watched = Watched()
        self._held_out: HeldOut | None = None
        self._to_draw: Sequence[Record] = ()
        self.said: set[str] = set()
        """What went wrong in a look, once."""

    def open(self, state: TrainState, log: Log) -> None:
        if not self._is_lead:
            return
        if self._config.on_corrupt == "skip":
            self._pardon = skipping(log.say)
        self._watched = Watched.read(self._config.out)
        self._open_held_out(state, log)
        if self._held_out is None:
            log.say("the set holds no held-out record yet: the gap is measured once it does")
        if self._config.save_samples:
            self._open_pictures(log)

    def _open_held_out(self, state: TrainState, log: Log) -> None:
        before = self._watched.held_out
        found = found_again(self._shards, before, self._pardon, log.say) or self._first_held_out(state.epoch)
        if not found:
            return
        held_out = HeldOut(self._objective, [record for _, record in found], device=self._world.device,
                           text_rows=state.student.config.text_max_length,
                           batch=min(BATCH, self._config.batch_size))  # fmt: skip
        chosen = tuple(each for each, _ in found)
        if before and chosen != before:
            log.say("the held-out gap is of other records from here on: not to be compared with what it was",
                    records=len(chosen), before=len(before))  # fmt: skip
        if chosen != before:
            self._keep(held_out=chosen, untrained_gap=None)
        self._held_out = held_out

    def _first_held_out(self, epoch: int) -> list[Found]:
        """Of the first epoch that has any: as if it had been chosen then."""
        if not with_held_out(self._freeze(epoch)):
            return []
        of_epochs = (self._freeze(number) for number in range(epoch + 1))
        found = (found_held_out(self._shards, receipts, NUM_HELD_OUT, self._pardon) for receipts in of_epochs)
        return next((some for some in found if some), [])

    def _open_pictures(self, log: Log) -> None:
        why = why_undrawable(self._shards)
        if why:
            log.say("no pictures are drawn", why=why)
            return
        _require_writable(self._folder)
        same_prompts = self._watched.sample_prompts == self._config.sample_prompts
        before = self._watched.pictures if same_prompts else ()
        found = found_again(self._shards, before, self._pardon, log.say) or self._first_to_draw()
        chosen = tuple(each for each, _ in found)
        if before and chosen != before:
            log.say("the pictures are of other records from here on", records=len(chosen), before=len(before))
        if chosen != before:
            self._keep(pictures=chosen, sample_prompts=self._config.sample_prompts)
        self._to_draw = [record for _, record in found]

    def _first_to_draw(self) -> list[Found]:
        if self._config.sample_prompts:
            return found_of_prompts(self._shards, self._config.sample_prompts, self._pardon)
        return found_first(self._shards, self._freeze(0), NUM_SAMPLES, self._pardon)

    def _keep(self, **changes: Any) -> None:
        watched = dataclasses.replace(self._watched, **changes)
        watched.write(self._config.out)
        self._watched = watched

    def measure_untrained(self, state: TrainState) -> None:
        """Later than at step 0 a second student must be made for it: once for a run and its records."""
        if self._held_out is None or (state.step and self._watched.untrained_gap is not None):
            return
        device = self._world.device
        first = first_student(self._config).to(device).eval() if state.step else averaged(state, device)
        self._keep(untrained_gap=self._held_out.gap(first).numbers()["gap"])

    def measure(self, state: TrainState, log: Log) -> None:
        if not self._is_lead:
            return
        if self._held_out is None:
            self._open_held_out(state, log)
        if self._held_out is None:  # the set holds no held-out prompt yet
            return
        with survived("the untrained student's gap", log, self.said):
            self.measure_untrained(state)
        numbers = self._held_out.gap(averaged(state, self._world.device)).numbers()
        untrained = self._watched.untrained_gap
        log.metric(event="held_out", step=state.step, points=self._held_out.num_points, **numbers,
                   untrained_gap=untrained)  # fmt: skip
        log.say("held-out gap to the teacher (1: no better than the mean)", gap=shown(numbers["gap"]),
                untrained=shown(untrained))  # fmt: skip

    def wants_pictures(self, step: int, *, last: bool) -> bool:
        interval = self._config.sample_interval * self._steps_per_epoch
        return bool(self._to_draw) and (last or int(step / interval) > int((step - 1) / interval))

    def draw(self, state: TrainState, log: Log) -> None:
        answer = said(averaged(state, self._world.device), self._objective.drawn, None)
        mine, theirs = pairs(self._shards, answer, self._to_draw,
                             self._objective.grid(None), text_rows=state.student.config.text_max_length,
                             device=self._world.device)  # fmt: skip
        epoch = round(state.step / self._steps_per_epoch)
        self._folder.mkdir(parents=True, exist_ok=True)
        for number, (picture, teachers) in enumerate(zip(mine, theirs, strict=True)):
            both = Image.fromarray(side_by_side(picture, teachers))
            both.save(self._folder / f"epoch_{epoch:04d}_sample_{number:02d}.png")
        log.metric(event="pictures", step=state.step, folder=str(self._folder))
        log.say(f"{len(mine)} pictures of epoch {epoch}, each beside {whose(self._shards)}", folder=self._folder)

    @property
    def _folder(self) -> Path:
        return self._config.sample_dir or self._config.out / SAMPLES


def why_undrawable(shards: ShardSet) -> str | None:
    """None: the set's latents can be decoded here."""
    folder = sound(shards.path / ASSETS, "vae")
    kind = read_vae_values(folder).get("_class_name")
    if kind != DECODER:
        return f"the set's autoencoder is {kind}, and only Wan's is known here"
    load_vae(folder)
    return None


def whose(shards: ShardSet) -> str:
    """A record's `final`."""
    return "the set's own" if shards.contract.source == "images" else "its teacher's"


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadUsage(wrong=f"sample_dir: {folder} cannot be written", found=error.strerror or str(error),
                       mend="give another folder, or save_samples: false") from None  # fmt: skip


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
