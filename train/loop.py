"""The training loop: a student against what a shard set says.

train(config, world)

set-up -> restore the newest valid checkpoint -> for each step: forward, backward, optimizer, EMA -> checkpoints
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from common.config import save_config
from common.errors import BadUsage, Refused
from common.log import Log, human_seconds
from common.record import Contract
from common.shards import ShardSet
from common.stop import StopRequest
from common.watch import Watch
from train.config import TrainConfig
from train.data import Feed, Step
from train.dist import World
from train.epochs import Epochs
from train.loss import NUM_LEVELS, level_sums, output_loss
from train.optim import learning_rate, make_optimizer, update_ema
from train.order import Order
from train.run_folder import CONFIG_NAME, EPOCHS, RANKS
from train.state import TrainState, restore, save_checkpoint
from train.student import WanLite, load_student


def train(config: TrainConfig, world: World) -> None:
    """Run to the end of the plan, from wherever an earlier run stopped."""
    # A log and a heartbeat before anything is loaded.
    lead = world.rank == 0
    run_dir = config.out if lead else config.out / RANKS / str(world.rank)
    log = Log("train", run_dir, quiet=not lead)
    with StopRequest() as stop, Watch(run_dir, log) as watch:
        if config.threads:
            torch.set_num_threads(config.threads)
        with watch.stage("load", deadline_s=config.deadline_s):
            shards = ShardSet.open(config.set, library=config.reader == "library")
            student = open_student(config, shards.contract).to(world.device).train()
            state = new_state(student, config)
            facts = restore(config.out, state, log) or {}
            run = _plan_run(config, world, shards, state, facts)
        if lead:
            save_config(config, config.out / CONFIG_NAME)
            log.say(run.summary(student))
        watch.running()
        watch.moved(step=state.step, samples_seen=state.samples_seen)
        run.loop(student, log, watch, stop)


def open_student(config: TrainConfig, contract: Contract) -> WanLite:
    """The student as `train init` left it, if it fits the set."""
    if not (config.init / "model.safetensors").exists():
        raise BadUsage(
            wrong="there is no student to start from",
            found=f"nothing in {config.init}",
            mend=f"python -m train init --teacher DIR --student configs/students/NAME.json --out {config.init}",
        )
    student = load_student(config.init)
    wants = {"in_channels": contract.latent_channels, "text_dim": contract.text_dim}
    for name, number in wants.items():
        if getattr(student.config, name) != number:
            raise Refused(
                wrong=f"the student does not fit the set: {name}",
                found=f"{getattr(student.config, name)}, the set has {number}",
                mend="make the student again from the set's own teacher",
            )
    return student


def new_state(student: WanLite, config: TrainConfig) -> TrainState:
    ema = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    return TrainState(student=student, ema=ema, optimizer=make_optimizer(student, config))


class Run:
    """What stays the same from the first step of a run to its last."""

    def __init__(self, *, config: TrainConfig, world: World, shards: ShardSet, state: TrainState, epochs: Epochs,
                 global_batch: int) -> None:  # fmt: skip
        self.config, self.world, self.shards, self.state = config, world, shards, state
        self.epochs, self.global_batch = epochs, global_batch
        self.order = Order(config.seed, epochs.freeze, state.cursor)
        self.epoch_samples = self.order.epoch_length(0)
        self.total_steps = math.ceil(config.num_epochs * self.epoch_samples / global_batch)
        w = config.guidance or shards.contract.guidance
        self.guidance = torch.tensor(w, device=world.device)

    def summary(self, student: WanLite) -> str:
        millions = sum(parameter.numel() for parameter in student.parameters()) / 1e6
        return (
            f"student of {millions:.2f} M parameters, {self.epoch_samples} samples an epoch, "
            f"{self.total_steps} steps of {self.global_batch} on {self.world.size} x {self.world.device_name}"
        )

    def loop(self, student: WanLite, log: Log, watch: Watch, stop: StopRequest) -> None:
        state, config = self.state, self.config
        wrapped = self.world.wrap(student)
        tally = Tally(self.world)
        feed = Feed(self.shards, self.order, global_batch=self.global_batch, micro_batch=config.batch_size,
                    rank=self.world.rank, world=self.world.size, deadline_s=config.deadline_s,
                    read_workers=config.read_workers, on_corrupt=config.on_corrupt,
                    text_max_length=student.config.text_max_length, say=log.say)  # fmt: skip
        steps = iter(feed)
        try:
            while state.step < self.total_steps:
                with watch.stage("data", deadline_s=config.deadline_s), tally.waiting():
                    step = next(steps)
                with watch.stage("step", deadline_s=config.deadline_s):
                    self._step(wrapped, step, tally)
                watch.moved(step=state.step, samples_seen=state.samples_seen)
                if state.step % config.log_every == 0 or state.step == self.total_steps:
                    self._log(log, tally)
                last = state.step == self.total_steps
                asked = self.world.any(stop.asked) if self.world.size > 1 else stop.asked
                if asked or last or state.step % config.checkpoint_every == 0:
                    with watch.stage("save", deadline_s=config.deadline_s):
                        self._save(log)
                if asked and not last:
                    raise stop.fault()
        finally:
            feed.close()
        log.say("done", samples=state.samples_seen)

    def _step(self, student: nn.Module, step: Step, tally: "Tally") -> None:
        """One optimizer step over the micro-batches of this rank."""
        state, config = self.state, self.config
        rate = learning_rate(state.step, self.total_steps, config)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad(set_to_none=True)
        for number, host_micro in enumerate(step.micros):
            micro = host_micro.to(self.world.device)
            with _sync_only_last(student, number == len(step.micros) - 1), self._autocast():
                loss, per_sample = output_loss(student, micro, self.guidance)
                (loss / len(step.micros)).backward()
            tally.add(micro.sigmas, per_sample)
        norm = nn.utils.clip_grad_norm_(state.student.parameters(), config.max_grad_norm)
        state.optimizer.step()
        update_ema(state.ema, state.student, state.step, config.ema_decay)
        state.step += 1
        state.samples_seen += self.global_batch
        state.cursor, state.epoch = step.cursor, step.epoch
        tally.note(norm=norm, rate=rate, ids=step.ids)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def _log(self, log: Log, tally: "Tally") -> None:
        numbers = tally.take(self.global_batch)
        state = self.state
        left = (self.total_steps - state.step) / numbers["steps_per_s"]
        log.metric(step=state.step, samples_seen=state.samples_seen, epoch=state.epoch, **numbers)
        log.say(f"step {state.step}/{self.total_steps}", loss=f"{numbers['loss']:.4f}",
                samples=f"{numbers['samples_per_s']:.0f}/s", data_wait=f"{100 * numbers['data_wait']:.1f}%",
                left=human_seconds(left))  # fmt: skip

    def _save(self, log: Log) -> None:
        if self.world.rank == 0:
            facts = {
                "contract": self.shards.contract.digest(),
                "epoch_digest": self.epochs.digest(self.state.epoch),
                "global_batch": self.global_batch,
                "total_steps": self.total_steps,
                "student": self.state.student.config.to_dict(),
            }
            began = time.monotonic()
            folder = save_checkpoint(self.config.out, self.state, facts, keep=self.config.keep_checkpoints)
            log.say(f"checkpoint {folder.name}", seconds=f"{time.monotonic() - began:.2f}")


class Tally:
    """What happened since the last log line."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(2, NUM_LEVELS, dtype=torch.float64, device=self._world.device)
        self._began, self._waited, self._num_steps = time.monotonic(), 0.0, 0
        self._last: dict[str, Any] = {}

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def add(self, sigmas: Tensor, per_sample: Tensor) -> None:
        self._sums += level_sums(sigmas, per_sample)

    def note(self, *, norm: Tensor, rate: float, ids: tuple[str, ...]) -> None:
        self._num_steps += 1
        self._last = {"norm": norm, "rate": rate, "ids": ids}

    def take(self, global_batch: int) -> dict[str, Any]:
        sums, counts = self._world.summed(self._sums).tolist()
        spent = max(time.monotonic() - self._began, 1e-9)
        numbers = {
            "loss": sum(sums) / sum(counts),
            "loss_by_level": [total / count if count else None for total, count in zip(sums, counts, strict=True)],
            "lr": self._last["rate"],
            "grad_norm": float(self._last["norm"]),
            "first_sample": self._last["ids"][0],
            "data_wait": self._waited / spent,
            "steps_per_s": self._num_steps / spent,
            "samples_per_s": self._num_steps * global_batch / spent,
        }
        self._reset()
        return numbers


def _plan_run(config: TrainConfig, world: World, shards: ShardSet, state: TrainState, facts: dict[str, Any]) -> Run:
    """A resumed run keeps its set, its epochs and its global batch, whatever the number of processes is now."""
    epochs = Epochs(shards, config.out / EPOCHS, rank=world.rank)
    global_batch = config.global_batch or facts.get("global_batch") or config.batch_size * world.size
    if facts and facts["contract"] != shards.contract.digest():
        raise Refused(
            wrong=f"{config.out} was trained on a set of another contract",
            found=f"{shards.contract.digest()[:16]}, was {facts['contract'][:16]}",
            mend="give the set it was trained on, or another `out`",
        )
    if facts and facts["epoch_digest"] != epochs.digest(state.epoch):
        raise Refused(
            wrong=f"epoch {state.epoch} is not the one that the checkpoint was trained on",
            found=f"another {config.out / EPOCHS}",
            mend="restore that folder, or start a new run",
        )
    return Run(config=config, world=world, shards=shards, state=state, epochs=epochs, global_batch=global_batch)


def _sync_only_last(student: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients cross the network once per optimizer step."""
    if last or not isinstance(student, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return student.no_sync()
