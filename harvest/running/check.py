"""`harvest run --check`: one micro-batch through every stage, in a scratch set that is removed again.

    check(config)          says how long load, encode, denoise, write and verify took, or which of them did not end

What would fail in the night fails now: a folder that does not load, a micro-batch that does not fit, a disk that is
not writable, a teacher that says nothing. A stage that does not end within deadline_s ends the process.
"""

import contextlib
import faulthandler
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace

from common.errors import Partial
from common.files import TEMPORARY_PREFIX
from common.log import Log
from common.shards import RUNS, ShardSet
from common.stop import StopRequest
from harvest.assets import leave_assets
from harvest.config import HarvestConfig
from harvest.granary.verify import require_whole
from harvest.meaning import make_contract, make_numerics
from harvest.running.events import HarvestWatch
from harvest.running.health import Health
from harvest.running.loop import ready_teacher
from harvest.running.shortage import memory_told
from harvest.running.task import read_task

STDERR = 2
"""The descriptor: sys.stderr may be something without one."""


def check(config: HarvestConfig) -> None:
    task, log = read_task(config), Log("harvest")
    scratch = config.out.parent / f"{TEMPORARY_PREFIX}check-{os.getpid()}"
    item = max(task.plan.items, key=lambda item: item.height * item.width)  # if that fits, all do
    item = replace(item, questions=item.questions[: config.micro_batch])
    try:
        with StopRequest() as stop, HarvestWatch(scratch / RUNS, log, stop, None) as watch:
            with _timed("load", config, log), memory_told(config, task.resolved):
                teacher = ready_teacher(task, watch, log)
            from harvest.latents import open_pictures
            from harvest.rollout import rollout

            contract = make_contract(config, teacher.facts, teacher.fingerprints, teacher.compute_dtype)
            shards = ShardSet.create(scratch, contract)
            pictures = open_pictures(config, contract, task.resolved, teacher, watch.moved, watch.heed)
            with _timed("encode", config, log), memory_told(config, task.resolved):
                teacher.encode([question.prompt for question in item.questions])
            with _timed("denoise", config, log), memory_told(config, task.resolved):
                records = rollout(teacher, item, contract, micro_batch=config.micro_batch, moved=watch.moved,
                                  pictures=pictures)  # fmt: skip
            missing = [] if pictures is None else pictures.faults(item)
            good, faults = Health(shards, config.max_quarantined, log).sift(records, missing)
            if faults:
                first = f"{faults[0]['what']}: {faults[0]['where']}"
                raise Partial(wrong=f"{len(faults)} of {len(item.questions)} records would be quarantined", found=first,
                              mend="compute in bfloat16 or float32 (teacher.dtype)")  # fmt: skip
            with _timed("write", config, log):
                receipt = shards.commit(good, make_numerics(config, teacher), container=config.container)
                leave_assets(shards, task.resolved, teacher)
            with _timed("verify", config, log):
                require_whole(shards, receipt)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    log.say(f"checked: {len(good)} records of {item.height}x{item.width} walked, written and read back")


@contextlib.contextmanager
def _timed(stage: str, config: HarvestConfig, log: Log) -> Iterator[None]:
    """Under a deadline that holds also where Python does not come to speak: stacks, then the end of the process."""
    log.say(f"check: {stage} ...", deadline=f"{config.deadline_s:.0f}s")
    faulthandler.dump_traceback_later(config.deadline_s, exit=True, file=STDERR)
    began = time.monotonic()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    log.say(f"check: {stage}", seconds=f"{time.monotonic() - began:.1f}")
