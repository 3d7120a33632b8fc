"""What is to be done: everything that is known of a configuration before a weight is read.

    task = read_task(config)                          what a run, a plan or a check begins with, and refuses
    task = unfinished_task(config, part, stop)        the same with a heartbeat; None, and said, where all is done

folder -> facts -> does the set at `out` mean the same? -> prompts (or pictures), which may take long -> plan
"""

import contextlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import Refused
from common.files import replace_quietly
from common.log import Log
from common.record import item_id
from common.shards import CONTRACT_NAME, RUNS, ShardSet
from common.stop import StopRequest
from common.watch import HEARTBEAT_NAME
from harvest.config import HarvestConfig
from harvest.loading.folder import Resolved, resolve
from harvest.meaning import require_same_meaning
from harvest.plan import Plan, Question, check_size, make_plan
from harvest.running.agenda import Leases
from harvest.running.events import HarvestWatch
from harvest.running.slices import WHOLE, Slice
from harvest.samples import missing_samples
from harvest.teacher import TeacherFacts
from harvest.teachers import facts_of

RUN_NAME = "run.json"
"""In the folder of a run that has begun."""
Moved = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What was asked for, with everything that is known of it before a weight is read."""

    config: HarvestConfig
    resolved: Resolved
    facts: TeacherFacts
    plan: Plan

    def is_finished(self, moved: Moved = lambda: None) -> bool:
        """Nothing is left to ask, and every sample is drawn."""
        shards = self.shards
        return shards is not None and self.plan.is_done(shards, moved) and not self.missing_samples

    @property
    def shards(self) -> ShardSet | None:
        """What was begun; None before that."""
        return ShardSet.open(self.config.out) if (self.config.out / CONTRACT_NAME).exists() else None

    @property
    def digest(self) -> str:
        """Of what is asked for: other prompts, another one."""
        return item_id([item.id for item in self.plan.items])

    @property
    def missing_samples(self) -> list[Question]:
        return missing_samples(self.config, self.config.out, self.config.samples)


def read_task(config: HarvestConfig, moved: Moved = lambda: None) -> Task:
    """A mistake in the configuration, the prompts or the folder costs nothing yet."""
    resolved = resolve(config.teacher.folder, config.teacher.variant, config.teacher.rest)
    facts = facts_of(resolved)
    if config.samples:
        check_size(config.height, config.width, facts)
    require_same_meaning(config, facts)
    return Task(config=config, resolved=resolved, facts=facts, plan=make_plan(config, facts, moved))


def unfinished_task(config: HarvestConfig, part: Slice, stop: StopRequest, planned: str | None = None) -> Task | None:
    """`planned`: the digest of the task that others share with us: where items have other names, leases and receipts
    would tell nobody of anything."""
    with heard(config, part, stop, "plan") as moved:
        task = read_task(config, moved)
        if planned not in (None, task.digest):
            raise Refused(wrong="the prompts (or pictures) changed while the run was on", found="another plan than the "
                          "other workers have", mend="stop it and run the same command again")  # fmt: skip
        if not task.is_finished(moved):
            return task
    leave_finished(task)
    return None


def leave_finished(task: Task) -> None:
    Leases(task.config.out).sweep(ShardSet.open(task.config.out))
    Log("harvest").say(f"{task.plan.num_records} records asked for, none is missing in {task.config.out}")


@contextlib.contextmanager
def heard(config: HarvestConfig, part: Slice, stop: StopRequest, stage: str) -> Iterator[Moved]:
    """A heartbeat, a deadline and an ear for a wish to stop before a run has begun."""
    try:
        watch = HarvestWatch(run_dir(config), Log(named(part)), stop, config.on_event)
    except OSError:  # a finished set is finished on a full disk, too; who has something to write will say it
        yield stop.check
        return
    with watch, watch.stage(stage, deadline_s=config.deadline_s):
        watch.moved(slice=str(part))
        yield watch.moved


@contextlib.contextmanager
def traceless_unless_begun(config: HarvestConfig) -> Iterator[None]:
    """What is refused, or has nothing to do, was never there."""
    folder = run_dir(config)
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    run, beat = _stamp(folder / RUN_NAME), _bytes_of(folder / HEARTBEAT_NAME)  # of our number on another day
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # up to a folder that is somebody else's by now
            if _stamp(folder / RUN_NAME) == run:
                if beat is not None:
                    replace_quietly(folder / HEARTBEAT_NAME, beat)
                for path in absent:
                    shutil.rmtree(path) if path == folder else path.rmdir()


def named(part: Slice) -> str:
    """Of a process, in its log."""
    return "harvest" if part == WHOLE else f"harvest {part}"


def run_dir(config: HarvestConfig, pid: int | None = None) -> Path:
    """Of this process, or of another one of this host."""
    return config.out / RUNS / f"{socket.gethostname()}-{pid or os.getpid()}"


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns
