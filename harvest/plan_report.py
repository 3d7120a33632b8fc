"""`harvest plan`: what a run would do, said before a weight is read."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from common.log import human_bytes
from common.schedule import euler_grid, expert_of
from harvest.config import HarvestConfig
from harvest.folder import resolve
from harvest.loop import check_size, record_bytes
from harvest.plan import make_plan
from harvest.teachers import facts_of


def report(config: HarvestConfig) -> Iterator[str]:
    resolved = resolve(config.teacher.folder, config.teacher.variant)
    facts = facts_of(resolved)
    check_size(config, facts)
    size = record_bytes(config, facts)
    plan = make_plan(config, record_bytes=size)
    shift = config.shift or facts.shift
    experts = expert_of(euler_grid(config.steps, shift, boundary=facts.boundary).timesteps, facts.boundary)
    num_high = int((experts == 0).sum())
    num_batches = sum(-(-len(item.questions) // config.micro_batch) for item in plan.items)
    branches = 1 if config.teacher.batched_guidance else 2
    yield f"teacher   {facts.teacher} from {config.teacher.folder}: {resolved.summary()}"
    yield f"records   {plan.num_records} of {config.height}x{config.width} in {len(plan.items)} shards"
    forwards = [num_batches * num * branches for num in (num_high, config.steps - num_high)]
    yield f"forwards  {forwards[0]} high-noise, {forwards[1]} low-noise"
    yield f"steps     {config.steps} walked ({num_high} high-noise), {config.keep} kept, shift {shift:g}"
    free = shutil.disk_usage(_nearest_folder(config.out)).free
    yield f"disk      {human_bytes(plan.num_records * size)} and the texts, of {human_bytes(free)} free"


def _nearest_folder(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
