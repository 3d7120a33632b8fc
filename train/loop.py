"""The training loop: a student against what a shard set says.

train(config, world)

set-up -> restore the newest valid checkpoint -> for each step: batch, step (train/step.py), log, checkpoint, pictures
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.bar import Bar
from common.claim import claimed
from common.config import save_config
from common.errors import Partial
from common.log import Log, human_seconds
from common.shards import ShardSet
from common.stop import StopRequest
from common.watch import Watch
from train.config import TrainConfig
from train.dist import World
from train.events import run_log
from train.feed.data import Feed, Step
from train.feed.epochs import Epochs
from train.feed.order import Order
from train.lora import base_digest, require_base
from train.loss import level_weights
from train.objective import Objective, objective_of
from train.optim import gather
from train.out_of_memory import explained, fitted, survived
from train.resume import allow
from train.room import require_room
from train.run_folder import CONFIG_NAME, EPOCHS, LOCK_NAME, RANKS, looks_at
from train.saver import Saver
from train.start import new_state, open_student
from train.state import Keep, TrainState, restore
from train.step import Stepper, Taken, require_progress
from train.tally import Tally
from train.watching import Onlooker

Stage = Callable[[str], contextlib.AbstractContextManager[None]]


def train(config: TrainConfig, world: World, *, limit_s: float | None = None, follow_s: float = 0.0) -> None:
    """Run to the end of the plan, from wherever an earlier run stopped. `follow_s`: so long is waited for shards."""
    # A claim, a log and a heartbeat before anything is loaded.
    lead = world.rank == 0
    run_dir = config.out if lead else config.out / RANKS / str(world.rank)
    claim = claimed(config.out / LOCK_NAME, f"the run {config.out}") if lead else contextlib.nullcontext()
    with claim, run_log(config, run_dir, quiet=not lead) as log, StopRequest(limit_s) as stop, \
            Watch(run_dir, log) as watch:  # fmt: skip
        log.metric(event="start", rank=world.rank, ranks=world.size, device=world.device_name)
        with watch.stage("load", deadline_s=config.deadline_s + follow_s):
            run = set_up(config, world, log, stop, follow_s=follow_s)
        if lead:
            save_config(config, config.out / CONFIG_NAME)
            log.say(run.summary())
            require_room(config, run.state, run.total_steps, log)
        watch.running()
        watch.moved(step=run.state.step, samples_seen=run.state.samples_seen)
        with Bar(run.total_steps, done=run.state.step, alone=lead) as bar:
            run.loop(log, watch, stop, bar)


def set_up(config: TrainConfig, world: World, log: Log, stop: StopRequest, *, follow_s: float) -> "Run":
    """A resumed run keeps its epochs and its global batch, whatever the number of processes is now."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.allow_tf32 = config.precision != "float32"  # else its convolutions keep 10 bits of a float32
    shards = ShardSet.open(config.set, library=config.reader == "library")
    objective = objective_of(config, shards.contract)
    student = open_student(config, shards.contract).to(world.device).train()
    state = new_state(student, config, world)
    epochs = Epochs(shards, config.out / EPOCHS, rank=world.rank, follow_s=follow_s,
                    stopping=lambda: stop.asked)  # fmt: skip
    facts = restore(config.out, state, log)
    if world.smallest(state.samples_seen) != -world.smallest(-state.samples_seen):
        raise Partial(
            wrong="the processes read different checkpoints",
            found=f"process {world.rank} found {state.samples_seen} samples",
            mend="run again once all nodes see the same files",
        )
    if facts:
        allow(config, facts, contract=shards.contract.digest(), epoch=state.epoch,
              epoch_digest=epochs.digest(state.epoch), log=log)  # fmt: skip
        if config.lora is not None:
            require_base(config.init, facts["base"])
    global_batch = config.global_batch or (facts or {}).get("global_batch") or config.batch_size * world.size
    base = facts.get("base") if facts else base_digest(config.init)
    run = Run(config=config, world=world, shards=shards, state=state, epochs=epochs, objective=objective,
              base=base, global_batch=global_batch, patience_s=follow_s)  # fmt: skip
    run.onlooker.open(state, log)
    return run


class Run:
    """What stays the same from the first step of a run to its last."""

    def __init__(self, *, config: TrainConfig, world: World, shards: ShardSet, state: TrainState, epochs: Epochs,
                 objective: Objective, base: str | None, global_batch: int, patience_s: float) -> None:  # fmt: skip
        self.config, self.world, self.shards, self.state = config, world, shards, state
        self.epochs, self.objective, self.global_batch = epochs, objective, global_batch
        self.patience_s = patience_s
        self.base = base  # of the init that the run began with; older checkpoints say it with adapters alone
        points = None if objective.spans is None else tuple(begin for begin, _ in objective.spans)
        self.order = Order(config.seed, epochs.freeze, state.cursor, points=points)
        self.epoch_samples = self.order.epoch_length(0)
        self.total_steps = math.ceil(config.num_epochs * self.epoch_samples / global_batch)
        self.level_weights: Tensor | None = level_weights(config.level_shares, shards.contract, objective.spans)
        self.onlooker = Onlooker(config, shards, objective, world, freeze=epochs.freeze,
                                 steps_per_epoch=self.epoch_samples / global_batch)  # fmt: skip

    def summary(self) -> str:
        parameters = list(self.state.student.parameters())
        millions = sum(parameter.numel() for parameter in parameters) / 1e6
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad) / 1e6
        share = "" if trained == millions else f" ({trained:.3g} M of them trained)"
        is_cold = 2 * self.config.warmup_steps > self.total_steps
        return (
            f"student of {millions:.2f} M parameters{share}, {self.epoch_samples} samples an epoch, "
            f"{self.total_steps} steps of {self.global_batch} on {self.world.size} x {self.world.device_name}"
            + (f"; {self.config.warmup_steps} of them WARM UP: lr hardly comes to its height" if is_cold else "")
        )

    def loop(self, log: Log, watch: Watch, stop: StopRequest, bar: Bar) -> None:
        state, config = self.state, self.config
        stage = functools.partial(watch.stage, deadline_s=config.deadline_s + self.patience_s)
        tally = Tally(self.world, state)
        saver = Saver(config.out, Keep(newest=config.keep_checkpoints, every=config.keep_every), log)
        stepper = Stepper(config, self.world, state, self.objective, self.level_weights, self.total_steps)
        with stage("fit"):
            batch_size = self._batch_size(stepper, log)
        with stage("held-out"), survived("the untrained student's gap", log, self.onlooker.said):
            self.onlooker.measure_untrained(state)
        # Of the last step, if that was taken by an earlier start: what it came to.
        looks = looks_at(config.out, state.step) if state.step == self.total_steps else set()
        feed = self.feed(log, batch_size)
        steps = iter(feed)
        try:
            while state.step < self.total_steps:
                with stage("data"), tally.waiting():
                    step = next(steps)
                with stage("step"), explained(state, batch_size=batch_size, world=self.world):
                    taken = stepper.take(step)
                    asked = tally.add(taken, step, stop.asked)
                saver.require_sound()
                watch.moved(step=state.step, samples_seen=state.samples_seen)
                bar.moved(state.step)
                if taken.skipped:
                    self._say_skipped(log, step, taken)
                last = state.step == self.total_steps
                if state.step % config.log_every == 0 or last:
                    self._log(log, tally)
                if asked or last or state.step % config.checkpoint_every == 0:
                    with stage("save"):
                        self._save(saver)
                    if not (asked or last):
                        self._measure(log, stage)
                if not last and self.onlooker.wants_pictures(state.step, last=False):
                    self._draw(log, stage)
                if asked and not last:
                    with stage("save"):
                        saver.finish()
                        self.world.any(False)  # all leave together: a launcher ends the others when one has left
                    raise stop.fault()
            if "held_out" not in looks:
                self._measure(log, stage)
            if "pictures" not in looks and self.onlooker.wants_pictures(state.step, last=True):
                self._draw(log, stage)
            with stage("save"):
                saver.finish()
        finally:
            try:
                feed.close()
            finally:
                saver.finish()
        log.say("done", samples=state.samples_seen)

    def _measure(self, log: Log, stage: Stage) -> None:
        with stage("held-out"), survived("the held-out gap", log, self.onlooker.said):
            self.onlooker.measure(self.state, log)

    def _draw(self, log: Log, stage: Stage) -> None:
        with stage("pictures"), survived("pictures", log, self.onlooker.said):
            self.onlooker.draw(self.state, log)

    def _batch_size(self, stepper: Stepper, log: Log) -> int:
        config, per_rank = self.config, self.global_batch // self.world.size
        if config.fit == "exact":
            return config.batch_size
        sizes = [(receipt.height, receipt.width) for receipt in self.epochs.freeze(0)]
        return fitted(stepper, self.state, self.objective, self.shards.contract, sizes,
                      batch_size=config.batch_size, per_rank=per_rank, world=self.world, log=log)  # fmt: skip

    def feed(self, log: Log, batch_size: int) -> Feed:
        config = self.config
        return Feed(self.shards, self.order, global_batch=self.global_batch, micro_batch=batch_size,
                    rank=self.world.rank, world=self.world.size, deadline_s=config.deadline_s,
                    read_workers=config.read_workers, on_corrupt=config.on_corrupt,
                    text_max_length=self.state.student.config.text_max_length, spans=self.objective.spans,
                    say=log.say)  # fmt: skip

    def _log(self, log: Log, tally: Tally) -> None:
        numbers = tally.take()
        state = self.state
        left = (self.total_steps - state.step) / numbers["steps_per_s"]
        log.metric(step=state.step, samples_seen=state.samples_seen, epoch=state.epoch, **numbers)
        loss = "none" if numbers["loss"] is None else f"{numbers['loss']:.4f}"
        log.say(f"step {state.step}/{self.total_steps}", loss=loss,
                samples=f"{numbers['samples_per_s']:.0f}/s", data_wait=f"{100 * numbers['data_wait']:.1f}%",
                left=human_seconds(left))  # fmt: skip

    def _say_skipped(self, log: Log, step: Step, taken: Taken) -> None:
        """A stride of the global batch is this rank's, in its order."""
        mine = step.ids[self.world.rank :: self.world.size]
        ids = [mine[number] for number in taken.suspects]
        log.say("skipped a step: its gradient is not finite", step=self.state.step - 1, samples=",".join(ids[:8]))
        log.metric(event="skipped", step=self.state.step - 1, samples=ids)
        require_progress(self.state, ids)

    def _save(self, saver: Saver) -> None:
        if self.world.rank == 0:
            saver.save(self.state, self.facts())
        else:
            gather(self.state.student, self.state.optimizers)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says beside its state."""
        return {
            "config": self.config.model_dump(mode="json"),
            "contract": self.shards.contract.digest(),
            "epoch_digest": self.epochs.digest(self.state.epoch),
            "global_batch": self.global_batch,
            "total_steps": self.total_steps,
            "student": self.state.student.config.to_dict(),
            "base": self.base,
        }
