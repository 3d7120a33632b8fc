"""`harvest plan --probe`: how long the teacher takes, measured on itself: seconds where a harvest takes days.

    pace = probe(config, task)         one micro-batch of the plan's own prompts, at the configured size

Each expert is asked in turn, twice around: the first answer of the second round pays for the change of experts.
"""

import shutil
import statistics
import time
from dataclasses import dataclass
from os import getpid

import numpy as np

from common.files import TEMPORARY_PREFIX
from common.log import Log, human_seconds
from common.schedule import contract_grid, expert_of, seeded_noise
from common.shards import RUNS
from common.stop import StopRequest
from harvest.config import HarvestConfig
from harvest.meaning import make_contract
from harvest.running.events import HarvestWatch
from harvest.running.loop import ready_teacher
from harvest.running.shortage import memory_told
from harvest.running.task import Task
from harvest.teacher import Teacher

ROUNDS, TIMED = 2, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds."""

    answers: tuple[float, ...]
    """A micro-batch's cond and uncond, by expert."""
    change: float = 0.0
    """Of experts."""
    encode: float = 0.0
    """A prompt."""
    size: tuple[int, int]
    """(height, width) at which it was measured."""

    def told(self) -> str:
        answers = ", ".join(f"{seconds:.3g} s" for seconds in self.answers)
        size = "x".join(map(str, self.size))
        return f"{answers} an answer by expert at {size}, {self.change:.2g} s a change, {self.encode:.2g} s a prompt"


def probe(config: HarvestConfig, task: Task) -> Pace:
    log, scratch = Log("harvest"), config.out.parent / f"{TEMPORARY_PREFIX}probe-{getpid()}"
    try:
        with StopRequest() as stop, HarvestWatch(scratch / RUNS, log, stop, None) as watch:
            with watch.stage("load", deadline_s=config.deadline_s), memory_told(config, task.resolved):
                teacher = ready_teacher(task, watch, log)
            with watch.stage("denoise", deadline_s=config.deadline_s), memory_told(config, task.resolved):
                began = time.monotonic()
                pace = _measured(config, task, teacher, watch)
            log.say(f"probed in {human_seconds(time.monotonic() - began)}: {pace.told()}")
            return pace
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _measured(config: HarvestConfig, task: Task, asked: Teacher, watch: HarvestWatch) -> Pace:
    import torch

    contract = make_contract(config, asked.facts, asked.fingerprints, asked.compute_dtype)
    questions = (list(task.plan.items[0].questions) * config.micro_batch)[: config.micro_batch]
    asked.encode([contract.negative_prompt])  # not timed: the first one is slower
    began = time.monotonic()
    texts = asked.encode([question.prompt for question in questions])
    encode = (time.monotonic() - began) / len(questions)
    shape = (contract.latent_channels, config.height // contract.latent_stride, config.width // contract.latent_stride)
    noise = np.stack([seeded_noise(question.seed, shape) for question in questions])
    latents = torch.from_numpy(noise).to(asked.device)
    grid = contract_grid(contract, 0)
    experts = expert_of(grid.timesteps, contract.boundary, train_steps=contract.train_steps)
    taken: dict[int, list[float]] = {expert: [] for expert in range(contract.num_experts())}
    firsts: list[float] = []
    for number in range(ROUNDS):
        for expert in taken:
            condition = asked.condition(texts, texts[0])
            t = torch.full((len(questions),), float(grid.timesteps[int(np.argmax(experts == expert))]))
            for repeat in range(1 + TIMED):
                began = time.monotonic()
                asked.predict(latents, t, condition)[0].cpu()
                spent = time.monotonic() - began
                watch.moved()
                if repeat:
                    taken[expert].append(spent)
                elif number:
                    firsts.append(spent)
    answers = tuple(statistics.median(times) for times in taken.values())
    change = statistics.mean(max(first - answer, 0.0) for first, answer in zip(firsts, answers, strict=True))
    return Pace(answers=answers, change=change, encode=encode, size=(config.height, config.width))
