"""One worker of the harvest: load the teacher once, work its share of the plan item by item, commit each.

    num_added = harvest(config)
    num_added = harvest(config, part=Slice(rank=0, size=4), limit_s=1800)

heartbeat -> plan (running/task.py) -> is anything left? -> claim, log -> teacher -> for each item:
                                                     rollout (this thread) | check, pack, write (one beside it)

Killed at any moment, the same command goes on: an item is either committed or does not exist.
"""

import contextlib
import json
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version

from common.claim import claimed
from common.config import save_config
from common.files import write_atomic
from common.log import Log, human_seconds
from common.record import Numerics, Record
from common.shards import RUNS, ShardSet
from common.stop import StopRequest
from harvest.assets import leave_assets
from harvest.config import HarvestConfig
from harvest.forecast import crowded
from harvest.meaning import make_contract, make_numerics, say_numerics
from harvest.plan import WorkItem, record_bytes
from harvest.running.agenda import Leases, agenda
from harvest.running.events import HarvestWatch, tell
from harvest.running.health import Health
from harvest.running.progress import Progress
from harvest.running.shortage import disk_told, memory_told, with_room
from harvest.running.slices import WHOLE, Slice
from harvest.running.task import RUN_NAME, Task, named, run_dir, traceless_unless_begun, unfinished_task
from harvest.running.writer import Writer
from harvest.samples import draw_samples
from harvest.teacher import Teacher, work_of
from harvest.teachers import load_teacher

CONFIG_NAME = "config.yaml"
TOKENIZED_TOGETHER = 1000
RELEASES = ("torch", "diffusers", "transformers", "numpy", "zarr")


def harvest(config: HarvestConfig, *, strict: bool = False, part: Slice = WHOLE, limit_s: float | None = None,
            planned: str | None = None) -> int:  # fmt: skip
    """Work what remains of the plan, beginning with `part`; the number of records added."""
    with StopRequest(limit_s) as stop, traceless_unless_begun(config):
        task = unfinished_task(config, part, stop, planned)
        return 0 if task is None else work(task, part, strict, stop)


def work(task: Task, part: Slice, strict: bool, stop: StopRequest) -> int:
    """In this process; the number of records added."""
    config = task.config
    full = disk_told(config.out, lambda: _bytes_left(task))
    with full, holding(config, part), watched(config, part, stop) as (watch, log):
        log.say(task.plan.summary)
        return _work(task, part, strict, stop, watch, log)


def holding(config: HarvestConfig, part: Slice) -> contextlib.AbstractContextManager[None]:
    """One process a share and host; another host's is told apart by its leases."""
    name = f"{socket.gethostname()}-slice-{part.rank}-of-{part.size}.lock"
    return claimed(config.out / RUNS / name, f"slice {part} of {config.out}")


@contextlib.contextmanager
def watched(config: HarvestConfig, part: Slice, stop: StopRequest) -> Iterator[tuple[HarvestWatch, Log]]:
    """A heartbeat, a log, what is run and with what, before the first model byte."""
    folder = run_dir(config)
    log = Log(named(part), folder)
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
    for line in crowded(config, teacher.facts, mine, teacher.count_tokens):
        log.say(f"texts: {line}")

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

    pictures = open_pictures(config, shards.contract, task.resolved, teacher, alive, watch.heed)

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
    doubtful, num_cut = may_be_cut(prompts, teacher), 0
    for start in range(0, len(doubtful), TOKENIZED_TOGETHER):
        part = doubtful[start : start + TOKENIZED_TOGETHER]
        too_long = [(p, n - limit) for p, n in zip(part, teacher.count_tokens(part), strict=True) if n > limit]
        num_cut, num_tokens = num_cut + len(too_long), num_tokens + sum(beyond for _, beyond in too_long)
        cut = cut or (too_long[0][0] if too_long else "")
        watch.moved()
    if num_cut:
        told = f"{num_cut} of {len(prompts)} prompts are longer than the {limit} tokens that the teacher reads"
        log.say(f"{told}: their ends are cut", tokens=num_tokens, first=f"{cut[:60]}...")


def may_be_cut(prompts: Sequence[str], teacher: Teacher) -> list[str]:
    """The others need not be tokenized, which takes half a minute per million: in plain ASCII a token stands for one
    letter at least (no normal form makes more of it), but for the marks and one for the beginning of a word."""
    (marks,) = teacher.count_tokens([""])
    longest = teacher.facts.text_length - marks - 1
    return [prompt for prompt in prompts if len(prompt) > longest or not prompt.isascii()]


def _bytes_left(task: Task) -> int:
    """Of what is still to be written, texts left out."""
    items = iter(task.plan.items) if task.shards is None else task.plan.remaining(task.shards)
    return sum(len(item.questions) * record_bytes(task.config, task.facts, item.height, item.width) for item in items)
