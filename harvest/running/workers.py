"""Several workers on one machine, watched over: one per GPU, or as configured.

    supervise(config, part, num_workers(config), strict=False, limit_s=None)       one alone is this very process

Each is a process of its own (`python -m harvest run` with its share of the plan); they need nothing of each other. One
that dies is started again after a while; a place (a GPU) where MAX_FAULTS in a row died before they had added a record
is retired, and the others do its work. One that hangs, stalled or without a heartbeat for twice deadline_s, is killed,
and has died so. A fault that a restart cannot mend (exit codes 2 to 5) retires its place at once. If the supervisor
dies, however it does, the system ends its workers.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import BadUsage, Corrupt, Fault, Partial, Refused, Stopped
from common.log import Log
from common.stop import StopRequest
from common.watch import read_heartbeat
from harvest.config import HarvestConfig
from harvest.placing.places import WORKERS_HERE
from harvest.running.crew import gpus_of, placed_workers_asked_apart, share_out
from harvest.running.events import HarvestWatch, tell
from harvest.running.loop import CONFIG_NAME, holding, watched, work
from harvest.running.slices import Slice
from harvest.running.task import Task, heard, run_dir, traceless_unless_begun, unfinished_task

MAX_FAULTS = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
LOOK_EVERY_S, LISTEN_EVERY_S = 0.1, 2.0
STOPPED_WITHIN_S, KILLED_WITHIN_S = 30.0, 10.0
BEATS_WITHIN_S = 300.0
"""A new worker: it imports torch first, maybe from a network."""
PR_SET_PDEATHSIG = 1
MENDLESS = (BadUsage.exit_code, Refused.exit_code, Corrupt.exit_code)


@dataclass(slots=True, kw_only=True)
class Place:
    """Where one worker runs at a time."""

    part: Slice
    gpu: str | None
    """For CUDA_VISIBLE_DEVICES; several where there are more GPUs than workers."""
    sharers: int
    """Workers on this machine, it included."""
    process: subprocess.Popen[bytes] | None = None
    num_faults: int = 0
    """Since one of its workers added something."""
    code: int | None = None
    """How its last worker ended."""
    start_at: float = 0.0
    """Not before this."""
    lively_at: float = 0.0
    """When its worker was last heard to move."""
    started: float = 0.0
    """By the wall's clock: a heartbeat from before is another process's, of the same number."""
    done: bool = False
    retired: bool = False

    @property
    def is_wanted(self) -> bool:
        return not self.done and not self.retired

    def __str__(self) -> str:
        return f"worker {self.part}" + (f" on GPU {self.gpu}" if self.gpu else "")


def supervise(config: HarvestConfig, part: Slice, count: int | None, *, strict: bool, limit_s: float | None) -> None:
    """Until everything is done, or nobody is left to do it. The prompts are read once, and by each worker again."""
    with StopRequest(limit_s) as stop, traceless_unless_begun(config):
        task = unfinished_task(config, part, stop)
        if task is None:
            return
        if count is None:
            with heard(config, part, stop, "placement"):
                count = placed_workers_asked_apart(config, task.plan.sizes, stop.check)
        if count == 1:
            work(task, part, strict, stop)
        else:
            _supervise(task, part, count, strict, stop)


def _supervise(task: Task, part: Slice, count: int, strict: bool, stop: StopRequest) -> None:
    config = task.config
    gpus = share_out(gpus_of(config), count)
    places = [Place(part=share, gpu=gpu, sharers=count) for share, gpu in zip(part.split(count), gpus, strict=True)]
    with holding(config, part), watched(config, part, stop) as (watch, log):
        log.say(f"{len(places)} workers: {', '.join(map(str, places))}")
        watch.running()
        options = ["--planned", task.digest, *(["--strict"] if strict else [])]
        try:
            _watch_over(places, task, stop, watch, log, options)
        finally:
            _end_all(places)
        _judge(places, task, log)


def _watch_over(places: Sequence[Place], task: Task, stop: StopRequest, watch: HarvestWatch, log: Log,
                options: Sequence[str]) -> None:  # fmt: skip
    config_path, listen_at = run_dir(task.config) / CONFIG_NAME, 0.0
    while any(place.is_wanted for place in places):
        stop.check()
        for place in places:
            if place.process is None and place.is_wanted and time.monotonic() > place.start_at:
                place.started, place.lively_at = time.time(), time.monotonic()
                place.process = _start(place, config_path, options)
            elif place.process is not None and place.process.poll() is not None:
                _ended(place, places, task.config, log)
        if time.monotonic() > listen_at:
            listen_at = time.monotonic() + LISTEN_EVERY_S
            for place in places:
                _listen(place, task.config, log)
        watch.moved(workers=sum(place.process is not None for place in places))
        time.sleep(LOOK_EVERY_S)


def _start(place: Place, config_path: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "harvest", "run", str(config_path), "--slice", str(place.part), *options]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": place.gpu} if place.gpu else {})
    environment[WORKERS_HERE[0]] = str(place.sharers)
    return subprocess.Popen([*words, "--child-of", str(os.getpid())], env=environment, stdin=subprocess.DEVNULL)


def _listen(place: Place, config: HarvestConfig, log: Log) -> None:
    """Kill a worker that hangs: what its own watch reported a deadline ago still stands, or even that is silent."""
    if place.process is None:
        return
    now, beat = time.monotonic(), _beat_of(place, config)
    if beat is not None and not beat["state"].startswith("stalled") and time.time() - beat["time"] < config.deadline_s:
        place.lively_at = now
    silent_s = now - place.lively_at
    if silent_s > (max(config.deadline_s, BEATS_WITHIN_S) if beat is None else config.deadline_s):
        log.say(f"{place} hangs in '{beat['stage'] if beat else 'start'}' and is killed", silent_s=round(silent_s))
        place.process.kill()
        place.lively_at = now


def _beat_of(place: Place, config: HarvestConfig) -> dict[str, Any] | None:
    assert place.process is not None
    beat = read_heartbeat(run_dir(config, place.process.pid))
    return None if beat is None or beat["started"] < place.started - 1.0 else beat


def _ended(place: Place, places: Sequence[Place], config: HarvestConfig, log: Log) -> None:
    assert place.process is not None
    beat = _beat_of(place, config)
    place.code, place.process = place.process.returncode, None
    if place.code in (0, Partial.exit_code):
        place.done = True
        return
    has_added = beat is not None and beat.get("added", 0) > 0
    place.num_faults = 1 if has_added else place.num_faults + 1
    how = signal.Signals(-place.code).name if place.code < 0 else f"exit code {place.code}"
    if place.code in MENDLESS or place.num_faults >= MAX_FAULTS:
        place.retired = True
        log.say(f"{place} ended by {how} and is retired; the others do its work")
        tell(config.on_event, "retired", {"worker": str(place.part), "gpu": place.gpu, "how": how}, log)
        for other in places:  # also those that were done before it was given up
            other.done = False
        return
    pause_s = min(FIRST_PAUSE_S * 2 ** (place.num_faults - 1), LONGEST_PAUSE_S)
    place.start_at = time.monotonic() + pause_s
    log.say(f"{place} ended by {how}: started again in {pause_s:.0f} s")


def _judge(places: Sequence[Place], task: Task, log: Log) -> None:
    if any(place.code == Partial.exit_code for place in places):
        raise Partial(wrong="records are missing", found="a worker said so above", mend="see there, then run again")
    if task.is_finished():
        log.say("done")
        tell(task.config.on_event, "done", {"set": str(task.config.out), "records": task.plan.num_records}, log)
        return
    codes = sorted({place.code for place in places if place.retired and place.code is not None})
    if not codes:
        log.say("done here; others are at work on what is left")
        return
    raise fault_of(codes)(
        wrong="every worker was retired" if all(place.retired for place in places) else "items are left",
        found=f"exit codes {codes}; the reasons stand above and in runs/*/log.txt",
        mend="mend what they say, then run the same command again",
    )


def fault_of(codes: Sequence[int]) -> type[Fault]:
    """What to raise for processes that ended so."""
    return next((kind for kind in (BadUsage, Refused, Corrupt) if kind.exit_code in codes), Partial)


def _end_all(places: Sequence[Place]) -> None:
    """Politely, then not."""
    running = [place.process for place in places if place.process is not None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + STOPPED_WITHIN_S
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk cannot even be killed
                process.wait(KILLED_WITHIN_S)


def die_with(parent: int) -> None:
    """The system ends this process when its parent ends, by whatever means; at once if it is gone already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise Stopped(wrong="the supervisor is gone", found=f"process {parent}", mend="run the same command again")
