"""`harvest plan`: what a run would do, said before a weight is read."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common.errors import Fault
from common.log import human_bytes
from common.schedule import euler_grid, expert_of
from harvest.config import HarvestConfig
from harvest.loading.folder import Resolved, resolve
from harvest.plan import make_plan, record_bytes
from harvest.teacher import work_of
from harvest.teachers import facts_of, placement_of


def report(config: HarvestConfig) -> Iterator[str]:
    resolved = resolve(config.teacher.folder, config.teacher.variant, config.teacher.rest)
    facts = facts_of(resolved)
    plan = make_plan(config, facts)
    shift = config.shift or facts.shift
    experts = expert_of(euler_grid(config.steps, shift, boundary=facts.boundary).timesteps, facts.boundary)
    num_high = int((experts == 0).sum())
    num_batches = sum(-(-len(item.questions) // config.micro_batch) for item in plan.items)
    branches = 1 if config.teacher.batched_guidance else 2
    yield f"teacher   {facts.teacher} from {config.teacher.folder}: {resolved.summary()}"
    yield f"prompts   {plan.summary}"
    sizes = Counter({(item.height, item.width): 0 for item in plan.items})
    for item in plan.items:
        sizes[item.height, item.width] += len(item.questions)
    told = ", ".join(f"{count} of {height}x{width}" for (height, width), count in sizes.items())
    yield f"records   {told} in {len(plan.items)} shards"
    forwards = [num_batches * num * branches for num in (num_high, config.steps - num_high)]
    yield f"forwards  {forwards[0]} high-noise, {forwards[1]} low-noise"
    yield f"steps     {config.steps} walked ({num_high} high-noise), {config.keep} kept, shift {shift:g}"
    free = shutil.disk_usage(_nearest_folder(config.out)).free
    total = sum(count * record_bytes(config, facts, *size) for size, count in sizes.items())
    yield f"disk      {human_bytes(total)} and the texts, of {human_bytes(free)} free"
    yield from (f"placement {line}" for line in _placement(config, resolved))


def _placement(config: HarvestConfig, resolved: Resolved) -> list[str]:
    """On this machine, which need not be the one that will run it."""
    try:
        return placement_of(config.teacher, resolved, work_of(config)).lines()
    except Fault as fault:
        return [f"not on this machine: {fault}"]


def _nearest_folder(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
