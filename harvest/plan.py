"""What is to be asked: prompts and seeds become keys, keys become work items. Pure; reads no model.

    plan = make_plan(config)
    for item in plan.remaining(shards): ...      what no receipt holds yet, in a seeded shuffled order

Prompts are packed in file order into full items; an item's identity is the hash of its keys. After prompts were
appended, the item that grew is worked minus the keys that receipts of other items already hold.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from common.manifest import MAX_RECORDS
from common.record import item_id, record_key
from common.shards import MOVED, QUARANTINE, ShardSet
from harvest.config import HarvestConfig
from harvest.prompts import read_prompts, seed_of

SHARD_BYTES = 256_000_000
ORDER_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One record to be: what the teacher will be asked."""

    key: str
    prompt: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkItem:
    """One shard to be."""

    questions: tuple[Question, ...]
    height: int
    width: int

    @property
    def id(self) -> str:
        return item_id([question.key for question in self.questions])


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    items: tuple[WorkItem, ...]

    @property
    def num_records(self) -> int:
        return sum(len(item.questions) for item in self.items)

    def remaining(self, shards: ShardSet) -> Iterator[WorkItem]:
        """Items that still need work, shuffled, so that a set cut short is a fair sample of its prompts."""
        manifest = shards.manifest()
        planned = {item.id for item in self.items}
        held = {
            key
            for receipt in manifest.receipts
            if receipt.item not in planned
            for key in shards.read(receipt).header.keys
        }
        moved = moved_keys(shards)
        held |= quarantined_keys(shards) | {key for keys in moved.values() for key in keys}
        for index in np.random.default_rng(ORDER_SEED).permutation(len(self.items)):
            item = self.items[index]
            if item.id in manifest.by_item or item.id in moved:
                continue
            left = tuple(question for question in item.questions if question.key not in held)
            if left:
                yield replace(item, questions=left)


def make_plan(config: HarvestConfig, *, record_bytes: int | None = None) -> Plan:
    """`record_bytes` (known once the teacher's folder was read) bounds a shard when the configuration does not."""
    per_shard = config.records_per_shard or max(1, SHARD_BYTES // (record_bytes or SHARD_BYTES))
    per_shard = min(per_shard, MAX_RECORDS)
    questions = [
        _question(prompt, seed_of(prompt, number), config)
        for prompt in read_prompts(config.prompts.file, limit=config.prompts.limit)
        for number in range(config.prompts.seeds_per_prompt)
    ]
    items = tuple(
        WorkItem(questions=tuple(questions[start : start + per_shard]), height=config.height, width=config.width)
        for start in range(0, len(questions), per_shard)
    )
    return Plan(items=items)


def quarantined_keys(shards: ShardSet) -> set[str]:
    """Keys whose records were not finite: not asked again until `repair`."""
    folder = shards.path / QUARANTINE
    return {entry["key"] for path in sorted(folder.glob("[!.]*.json")) for entry in json.loads(path.read_bytes())}


def moved_keys(shards: ShardSet) -> dict[str, list[str]]:
    """Items that were carried elsewhere to free the disk, and their keys: done, though not here."""
    notes = (json.loads(path.read_bytes()) for path in (shards.path / MOVED).glob("[!.]*.json"))
    return {note["item"]: note["keys"] for note in notes}


def _question(prompt: str, seed: int, config: HarvestConfig) -> Question:
    return Question(key=record_key(prompt, seed, config.height, config.width), prompt=prompt, seed=seed)
