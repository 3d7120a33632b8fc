"""`harvest add-samples SET CONFIG --prompt ...`: more prompts for training to look at, drawn by the set's own teacher.

for line in add_samples(config, set_dir, prompts): ...
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from common.shards import ASSETS, ShardSet
from harvest.config import HarvestConfig
from harvest.granary.again import asked_again, task_for
from harvest.plan import check_size
from harvest.running.health import Health
from harvest.running.shortage import memory_told
from harvest.samples import SAMPLES, draw_samples, held_samples, missing_samples


def add_samples(config: HarvestConfig, set_dir: Path, prompts: Sequence[str]) -> Iterator[str]:
    """Text encoder and experts are loaded only where something is left to draw; the VAE never is."""
    ShardSet.open(set_dir)
    task = task_for(config, set_dir)
    check_size(config.height, config.width, task.facts)
    missing = missing_samples(config, set_dir, prompts)
    if missing:
        with (
            asked_again(task) as asked,
            asked.watch.stage("samples", deadline_s=config.deadline_s),
            memory_told(config, task.resolved),
        ):
            health = Health(asked.shards, 1.0, asked.log)
            draw_samples(asked.teacher, missing, task.config, asked.shards, asked.numerics, asked.watch.moved, health)
    yield f"{len(missing)} samples drawn, {len(held_samples(set_dir))} in {set_dir / ASSETS / SAMPLES}"
