"""Prompts that training looks at while it learns: encoded and drawn by the teacher, left in the set's assets.

    assets/samples/       a shard set of its own: a record for each prompt, at the configured size

    missing = missing_samples(config, set_dir)       Questions; nothing is loaded
    draw_samples(teacher, missing, ...)              `samples:` of a configuration at a run's beginning

`harvest add-samples` draws some later (harvest/granary/add_samples.py). They are walked like any record of the set.
The samples' contract is the set's, but for its source: with source renoise or images, too, a sample is what the teacher
draws. Training opens them with ShardSet.open and finds text, seed, size and the teacher's own end point.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from common.cleaning import clean_prompt
from common.errors import BadUsage, Partial
from common.record import Contract, Numerics, record_key
from common.shards import ASSETS, CONTRACT_NAME, ShardSet
from harvest.config import HarvestConfig
from harvest.plan import Question, WorkItem
from harvest.prompts import seed_of
from harvest.running.health import Health
from harvest.teacher import Teacher

SAMPLES = "samples"


def missing_samples(config: HarvestConfig, set_dir: Path, prompts: Sequence[str]) -> list[Question]:
    """Of these prompts, those that are not drawn yet; each has its first seed."""
    cleaned = dict.fromkeys(clean_prompt(prompt) for prompt in prompts)
    if "" in cleaned:
        raise BadUsage(wrong="a sample's prompt is empty", found=repr(prompts)[:80], mend="leave it out")
    held = held_samples(set_dir)
    wanted = []
    for prompt in cleaned:
        seed = seed_of(prompt, 0)
        key = record_key(prompt, seed, config.height, config.width)
        if key not in held:
            wanted.append(Question(key=key, prompt=prompt, seed=seed))
    return wanted


def held_samples(set_dir: Path) -> set[str]:
    if not (set_dir / ASSETS / SAMPLES / CONTRACT_NAME).exists():
        return set()
    samples = ShardSet.open(set_dir / ASSETS / SAMPLES)
    return {key for receipt in samples.manifest().receipts for key in samples.keys(receipt)}


def draw_samples(teacher: Teacher, questions: Sequence[Question], config: HarvestConfig, shards: ShardSet,
                 numerics: Numerics, moved: Callable[[], None], health: Health) -> None:  # fmt: skip
    """One shard for as many as are asked for at once."""
    from harvest.rollout import rollout

    contract = sample_contract(shards.contract)
    item = WorkItem(questions=tuple(questions), height=config.height, width=config.width)
    records = rollout(teacher, item, contract, micro_batch=config.micro_batch, moved=moved)
    good, faults = health.sift(records)
    if faults:
        raise Partial(wrong=f"{len(faults)} of {len(records)} samples cannot be drawn", found=faults[0]["where"],
                      mend="compute in bfloat16 or float32 (teacher.dtype)")  # fmt: skip
    ShardSet.create(shards.path / ASSETS / SAMPLES, contract).commit(good, numerics, container=config.container)


def sample_contract(contract: Contract) -> Contract:
    return dataclasses.replace(contract, source="trajectory")
