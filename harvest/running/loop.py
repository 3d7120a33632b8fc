"""One worker of the harvest: load the teacher once, work its share of the plan item by item, commit each.

    num_added = harvest(config)
    num_added = harvest(config, part=Slice(rank=0, size=4), limit_s=1800)

settings, plan -> is anything left? -> claim, log, heartbeat -> teacher -> for each item: rollout | check, pack, write
                                                                           (this thread)   (one beside it)

Killed at any moment, the same command goes on: an item is either committed or does not exist.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from common.claim import claimed
from common.config import save_config
from common.errors import Refused
from common.files import write_atomic
from common.log import Log, human_seconds
from common.record import Numerics, Record, item_id
from common.shards import CONTRACT_NAME, RUNS, ShardSet
from common.stop import StopRequest
from harvest.assets import leave_assets
from harvest.config import HarvestConfig
from harvest.loading.folder import Resolved, resolve
from harvest.meaning import is_finished, make_contract, make_numerics, say_numerics
from harvest.plan import Plan, Question, WorkItem, check_size, make_plan, record_bytes
from harvest.running.agenda import Leases, agenda
from harvest.running.events import HarvestWatch, tell
from harvest.running.health import Health
from harvest.running.progress import Progress
from harvest.running.shortage import disk_told, memory_told, with_room
from harvest.running.slices import WHOLE, Slice
from harvest.running.writer import Writer
from harvest.samples import draw_samples, missing_samples
from harvest.teacher import Teacher, TeacherFacts, work_of
from harvest.teachers import facts_of, load_teacher

CONFIG_NAME, RUN_NAME = "config.yaml", "run.json"
TOKENIZED_TOGETHER = 1000
RELEASES = ("torch", "diffusers", "transformers", "numpy", "zarr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What was asked for, with everything that is known of it before a weight is read."""

    config: HarvestConfig
    resolved: Resolved
    facts: TeacherFacts
    plan: Plan

    @property
    def is_finished(self) -> bool:
        """Nothing is left to ask, and every sample is drawn."""
        return is_finished(self.config, self.facts, self.plan) and not self.missing_samples

    @property
    def digest(self) -> str:
        """Of what is asked for: other prompts, another one."""
        return item_id([item.id for item in self.plan.items])

    @property
    def missing_samples(self) -> list[Question]:
        return missing_samples(self.config, self.config.out, self.config.samples)


def read_task(config: HarvestConfig) -> Task:
    """A mistake in the configuration, the prompts or the folder costs nothing yet."""
    resolved = resolve(config.teacher.folder, config.teacher.variant, config.teacher.rest)
    facts = facts_of(resolved)
    if config.samples:
        check_size(config.height, config.width, facts)
    return Task(config=config, resolved=resolved, facts=facts, plan=make_plan(config, facts))


def harvest(config: HarvestConfig, *, strict: bool = False, part: Slice = WHOLE, limit_s: float | None = None,
            planned: str | None = None) -> int:  # fmt: skip
    """Work what remains of the plan, beginning with `part`; the number of records added. `planned`: the digest of the
    task that others share with us: where items have other names, leases and receipts would tell nobody of anything."""
    task = read_task(config)
    if planned not in (None, task.digest):
        raise Refused(wrong="the prompts (or pictures) changed while the run was on", found="another plan than the "
                      "other workers have", mend="stop it and run the same command again")  # fmt: skip
    if task.is_finished:
        leave_finished(task)
        return 0
    full = disk_told(config.out, lambda: _bytes_left(task))
    with full, holding(config, part), StopRequest(limit_s) as stop, watched(config, part, stop) as (watch, log):
        log.say(task.plan.summary)
        return _work(task, part, strict, stop, watch, log)


def leave_finished(task: Task) -> None:
    Leases(task.config.out).sweep(ShardSet.open(task.config.out))
    Log("harvest").say(f"{task.plan.num_records} records asked for, none is missing in {task.config.out}")


def run_dir(config: HarvestConfig, pid: int | None = None) -> Path:
    """Of this process, or of another one of this host."""
    return config.out / RUNS / f"{socket.gethostname()}-{pid or os.getpid()}"


def holding(config: HarvestConfig, part: Slice) -> contextlib.AbstractContextManager[None]:
    """One process a share and host; another host's is told apart by its leases."""
    name = f"{socket.gethostname()}-slice-{part.rank}-of-{part.size}.lock"
    return claimed(config.out / RUNS / name, f"slice {part} of {config.out}")


@contextlib.contextmanager
def watched(config: HarvestConfig, part: Slice, stop: StopRequest) -> Iterator[tuple[HarvestWatch, Log]]:
    """A heartbeat, a log, what is run and with what, before the first model byte."""
    folder = run_dir(config)
    log = Log("harvest" if part == WHOLE else f"harvest {part}", folder)
    save_config(config, folder / CONFIG_NAME)
    manifest = {
        "command": sys.argv,
        "slice": str(part),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "releases": {name: version(name) for name in RELEASES},
    }
    write_atomic(folder / RUN_NAME, json.dumps(manifest, indent=1).encode())
    log.metric(started=str(part))
    with HarvestWatch(folder, log, stop, config.on_event) as watch:
        watch.moved(slice=str(part))
        yield watch, log


def _work(task: Task, part: Slice, strict: bool, stop: StopRequest, watch: HarvestWatch, log: Log) -> int:
    config = task.config
    with watch.stage("load", deadline_s=config.deadline_s), memory_told(config, task.resolved):
        teacher = ready_teacher(task, watch, log)
    shards = ShardSet.create(
        config.out, make_contract(config, teacher.facts, teacher.fingerprints, teacher.compute_dtype)
    )
    numerics = make_numerics(config, teacher)
    say_numerics(shards, numerics, log, strict=strict)
    leave_assets(shards, task.resolved, teacher)
    watch.running()
    health = Health(shards, config.max_quarantined, log)
    if part.rank == 0 and (samples := task.missing_samples):
        with watch.stage("samples", deadline_s=config.deadline_s), memory_told(config, task.resolved):
            draw_samples(teacher, samples, config, shards, numerics, watch.moved, health)
        log.say(f"{len(samples)} samples drawn")
    try:
        num_added = _work_items(task, part, teacher, shards, numerics, health, stop, watch, log)
        health.complain()
    finally:
        if health.num_bad:
            tell(config.on_event, "quarantine", {"bad": health.num_bad, "good": health.num_good}, log)
    log.say("done", added=num_added)
    return num_added


def _work_items(task: Task, part: Slice, teacher: Teacher, shards: ShardSet, numerics: Numerics, health: Health,
                stop: StopRequest, watch: HarvestWatch, log: Log) -> int:  # fmt: skip
    from harvest.activations import listening
    from harvest.latents import open_pictures
    from harvest.rollout import rollout

    config, mine = task.config, list(task.plan.remaining(shards, part))
    num_records, leases = sum(len(item.questions) for item in mine), Leases(config.out)
    log.say(f"{len(mine)} of {len(task.plan.items)} items to do, {num_records} records")
    say_cut(mine, teacher, watch, log)

    def finish(item: WorkItem, records: list[Record]) -> None:
        good, faults = health.sift(records, [] if pictures is None else pictures.faults(item))
        health.set_aside(item, faults)
        if good:
            with_room(partial(shards.commit, good, numerics, container=config.container), config.deadline_s, stop, log)
        leases.release(item.id)
        progress.committed(item, len(good), len(faults))
        health.require_few()

    def alive() -> None:
        writer.check()
        leases.touch()
        watch.moved(added=progress.num_added, of=num_records)

    pictures = open_pictures(config, task.resolved, teacher, alive, watch.heed)

    def moved() -> None:
        progress.moved(item)
        alive()

    def wait(seconds: float) -> None:
        stop.check()
        time.sleep(seconds)

    alone, writing = part == WHOLE, partial(watch.stage, "write", deadline_s=config.deadline_s)
    with Progress(num_records, len(mine), log, alone=alone) as progress, leases, Writer(finish, writing) as writer:
        for item in agenda(task.plan, shards, part, leases, writer.wait, wait):
            heard = listening(teacher, shards) if item.id == task.plan.items[0].id else contextlib.nullcontext()
            with memory_told(config, task.resolved), heard:
                records = rollout(teacher, item, shards.contract, micro_batch=config.micro_batch, moved=moved,
                                  alive=alive, stage=partial(watch.stage, deadline_s=config.deadline_s),
                                  pictures=pictures)  # fmt: skip
            writer.put(item, records)
            del records  # the writer's now: one item less in memory while the next one is walked
    watch.moved(added=progress.num_added)
    return progress.num_added


def ready_teacher(task: Task, watch: HarvestWatch, log: Log) -> Teacher:
    import torch

    config = task.config
    if config.teacher.threads:
        torch.set_num_threads(config.teacher.threads)
    began = time.monotonic()
    teacher = load_teacher(config.teacher, task.resolved, watch, log, work_of(config, task.plan.sizes))
    log.say(f"teacher loaded in {human_seconds(time.monotonic() - began)}")
    if config.shift is not None and config.shift != teacher.facts.shift:
        log.say(f"shift {config.shift} as configured; the folder's own is {teacher.facts.shift}")
    return teacher


def say_cut(items: Sequence[WorkItem], teacher: Teacher, watch: HarvestWatch, log: Log) -> None:
    """Once a run: prompts whose end the teacher will not see."""
    limit, cut, num_tokens = teacher.facts.text_length, "", 0
    prompts = list(dict.fromkeys(question.prompt for item in items for question in item.questions))
    num_cut = 0
    for start in range(0, len(prompts), TOKENIZED_TOGETHER):
        part = prompts[start : start + TOKENIZED_TOGETHER]
        too_long = [(p, n - limit) for p, n in zip(part, teacher.count_tokens(part), strict=True) if n > limit]
        num_cut, num_tokens = num_cut + len(too_long), num_tokens + sum(beyond for _, beyond in too_long)
        cut = cut or (too_long[0][0] if too_long else "")
        watch.moved()
    if num_cut:
        told = f"{num_cut} of {len(prompts)} prompts are longer than the {limit} tokens that the teacher reads"
        log.say(f"{told}: their ends are cut", tokens=num_tokens, first=f"{cut[:60]}...")


def _bytes_left(task: Task) -> int:
    """Of what is still to be written, texts left out."""
    has_begun = (task.config.out / CONTRACT_NAME).exists()
    items = task.plan.remaining(ShardSet.open(task.config.out)) if has_begun else iter(task.plan.items)
    return sum(len(item.questions) * record_bytes(task.config, task.facts, item.height, item.width) for item in items)
