"""The harvest itself: load the teacher once, work the plan item by item, commit each.

    num_added = harvest(config)

Killed at any moment, the same command goes on: an item is either committed or does not exist.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from common.config import save_config
from common.errors import BadUsage, Partial, Refused
from common.files import write_atomic
from common.log import Log, human_seconds
from common.record import Contract, Numerics, Record
from common.shards import QUARANTINE, RUNS, ShardSet
from common.stop import StopRequest
from common.watch import Watch
from harvest.assets import leave_assets
from harvest.config import HarvestConfig
from harvest.folder import Resolved, resolve
from harvest.plan import WorkItem, make_plan
from harvest.teacher import Fingerprints, Teacher, TeacherFacts
from harvest.teachers import facts_of, load_teacher


def harvest(config: HarvestConfig, *, strict: bool = False) -> int:
    """Work what remains of the plan; the number of records added."""
    # Settings and plan: nothing of a model is read yet, a mistake costs nothing.
    resolved = resolve(config.teacher.folder, config.teacher.variant)
    facts = facts_of(resolved)
    plan = make_plan(config, facts)
    # A heartbeat and a log before the first model byte.
    run_dir = config.out / RUNS / f"{socket.gethostname()}-{os.getpid()}"
    log = Log("harvest", run_dir)
    save_config(config, run_dir / "config.yaml")
    log.say(plan.summary)
    with StopRequest() as stop, Watch(run_dir, log) as watch:
        with watch.stage("load", deadline_s=config.deadline_s):
            teacher = _ready_teacher(config, resolved, watch, log)
        contract = make_contract(config, teacher.facts, teacher.fingerprints, teacher.compute_dtype)
        shards = ShardSet.create(config.out, contract)
        _say_numerics(shards, make_numerics(config, teacher), log, strict=strict)
        leave_assets(shards, resolved, teacher)
        watch.running()
        return _work(config, plan.items, list(plan.remaining(shards)), teacher, shards, watch, log, stop)


def _work(config: HarvestConfig, all_items: Sequence[WorkItem], items: Sequence[WorkItem], teacher: Teacher,
          shards: ShardSet, watch: Watch, log: Log, stop: StopRequest) -> int:  # fmt: skip
    from harvest.rollout import rollout

    log.say(f"{len(items)} of {len(all_items)} items to do, {sum(len(item.questions) for item in items)} records")
    numerics = make_numerics(config, teacher)
    num_added, num_bad, began = 0, 0, time.monotonic()

    def moved() -> None:
        stop.check()
        watch.moved(added=num_added)

    for number, item in enumerate(items, start=1):
        with watch.stage("denoise", deadline_s=config.deadline_s):
            records = rollout(teacher, item, shards.contract, micro_batch=config.micro_batch, moved=moved)
        with watch.stage("write", deadline_s=config.deadline_s):
            good = _without_bad(item, records, shards, log)
            if good:
                shards.commit(good, numerics, container=config.container)
        num_added += len(good)
        num_bad += len(records) - len(good)
        spent = time.monotonic() - began
        log.say(
            f"item {number}/{len(items)} {item.id} committed",
            records=len(good),
            rate=f"{num_added / spent:.1f}/s",
            left=human_seconds(spent / number * (len(items) - number)),
        )
        log.metric(item=item.id, records=num_added, quarantined=num_bad, seconds=round(spent, 3))
    if num_bad:
        raise Partial(
            wrong=f"{num_bad} records were not finite",
            found=f"see {shards.path / QUARANTINE}",
            mend="compute in bfloat16 or float32: into a new set, or into this one after removing that folder",
        )
    log.say("done", added=num_added)
    return num_added


def make_contract(config: HarvestConfig, facts: TeacherFacts, prints: Fingerprints, compute_dtype: str) -> Contract:
    import dataclasses

    from harvest.prompts import CLEANING

    num_experts = 1 if facts.boundary is None else 2
    if len(config.guidance) < num_experts:
        raise BadUsage(
            wrong="guidance", found=f"{config.guidance} for {num_experts} experts", mend="give one number per expert"
        )
    values = dataclasses.asdict(facts)
    if config.shift is not None:
        values["shift"] = config.shift
    return Contract(
        **values,
        **dataclasses.asdict(prints),
        text_cleaning=CLEANING,
        guidance=config.guidance[:num_experts],
        negative_prompt=config.negative_prompt,
        latent_dtype=config.latent_dtype,
        source="trajectory",
        solver="euler",
        jitter=config.jitter,
        steps=config.steps,
        keep=config.keep,
        keep_at=config.keep_at,
        compute_dtype=compute_dtype,
        encoding=config.encoding,
    )


def make_numerics(config: HarvestConfig, teacher: Teacher) -> Numerics:
    import diffusers
    import torch

    device = torch.cuda.get_device_name() if teacher.device.startswith("cuda") else teacher.device
    return Numerics(
        micro_batch=config.micro_batch,
        batched_guidance=config.teacher.batched_guidance,
        collapsed_padding=config.teacher.collapsed_padding and teacher.facts.text_padding == "zeros",
        attention=teacher.attention,
        device=device,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        diffusers=diffusers.__version__,
    )


def _say_numerics(shards: ShardSet, mine: Numerics, log: Log, *, strict: bool) -> None:
    """Other numerics move last bits, not meaning: they are said, and refused only when asked to."""
    others = {receipt.numerics for receipt in shards.manifest().receipts} - {mine}
    for other in others:
        told = ", ".join(mine.difference(other))
        if strict:
            raise Refused(wrong="the set holds shards of other numerics", found=told, mend="run without --strict")
        log.say(f"the set holds shards of other numerics (this run | those): {told}")


def _ready_teacher(config: HarvestConfig, resolved: Resolved, watch: Watch, log: Log) -> Teacher:
    import torch

    if config.teacher.threads:
        torch.set_num_threads(config.teacher.threads)
    began = time.monotonic()
    teacher = load_teacher(config.teacher, resolved, watch, log)
    log.say(f"teacher loaded in {human_seconds(time.monotonic() - began)}")
    if config.shift is not None and config.shift != teacher.facts.shift:
        log.say(f"shift {config.shift} as configured; the folder's own is {teacher.facts.shift}")
    return teacher


def _without_bad(item: WorkItem, records: Sequence[Record], shards: ShardSet, log: Log) -> list[Record]:
    """NaN and Inf never enter a shard: such a record is named, with where it went wrong, and set aside."""
    bad = {record.key: where for record in records if (where := record.bad_field(shards.contract.storage_dtype))}
    if bad:
        folder: Path = shards.path / QUARANTINE
        entries = [{"key": key, "where": where} for key, where in bad.items()]
        write_atomic(folder / f"{item.id}.json", json.dumps(entries, indent=1).encode())
        log.say(f"item {item.id}: {len(bad)} records quarantined", first=f"{entries[0]['key']} {entries[0]['where']}")
    return [record for record in records if record.key not in bad]
