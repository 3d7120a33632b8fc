"""Harvests to be killed, and the one who kills them: what remains in the end is what an undisturbed run leaves.

    python -m tests.faults.harvests CONFIG KILLS SEED WORKERS...     prints one JSON line for each number of workers

torch and diffusers are imported once; each round forks WORKERS children that harvest their shares of CONFIG (one child:
all of it), and kills them with SIGKILL at random moments of the time that an undisturbed run takes. A set that got
finished is measured and removed.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from common.config import load_config
from common.files import TEMPORARY_PREFIX
from common.shards import RUNS
from harvest.config import HarvestConfig
from harvest.running.loop import harvest
from harvest.running.slices import WHOLE, Slice
from harvest.running.task import read_task
from tests.made import tree


def import_all() -> None:
    """What a child would spend its life with; nothing is computed before the fork."""
    import diffusers
    import transformers
    import zarr

    assert diffusers.WanTransformer3DModel and transformers.UMT5EncoderModel and zarr
    import harvest.rollout
    import harvest.teachers.wan  # noqa: F401


def fork_harvest(config: HarvestConfig, part: Slice) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            harvest(config, part=part)
            code = 0
        finally:
            os._exit(code)
    return child


def digest(set_dir: Path) -> str:
    """Of all files but those under temporary names: a later run sweeps them when they are an hour old."""
    files = {name: found for name, found in tree(set_dir).items() if TEMPORARY_PREFIX not in name}
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def kill_often(config: HarvestConfig, kills: int, seed: int, num_workers: int) -> dict[str, object]:
    rng, killed, in_the_middle, ends = random.Random(seed), 0, 0, []
    task, parts = read_task(config), WHOLE.split(num_workers)
    began = time.monotonic()
    ends.append(finish(config, parts))
    life_s = time.monotonic() - began  # on this machine, as busy as it is
    while killed < kills:
        children = [fork_harvest(config, part) for part in parts]
        for child in children:
            time.sleep(rng.random() * life_s / num_workers)
            os.kill(child, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        num_receipts = len(list((config.out / "receipts").glob("[!.]*")))
        in_the_middle += 0 < num_receipts < len(task.plan.items)
        if num_receipts == len(task.plan.items):
            ends.append(finish(config, parts))
    return {"kills": killed, "in_the_middle": in_the_middle, "ends": [*ends, finish(config, parts)]}


def finish(config: HarvestConfig, parts: list[Slice]) -> str:
    """Run on to the end, without a kill; the set's digest. It is removed."""
    children = [fork_harvest(config, part) for part in parts]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(children)
    assert not list((config.out / RUNS / "leases").glob("[!.]*.json")) or len(parts) == 1
    found = digest(config.out)
    shutil.rmtree(config.out)
    return found


if __name__ == "__main__":
    path, kills, seed, *counts = sys.argv[1:]
    import_all()
    for count in counts:
        killed = kill_often(load_config(HarvestConfig, Path(path)), int(kills), int(seed), int(count))
        sys.stdout.write(json.dumps(killed) + "\n")
