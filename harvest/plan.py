"""What is to be asked: prompts and seeds become keys, keys become work items. Pure; reads no model.

    plan = make_plan(config, facts)              facts of the teacher's folder: what divides, what a record weighs
    for item in plan.remaining(shards): ...      what no receipt holds yet, in a seeded shuffled order

Prompts are packed in file order into full items; an item's identity is the hash of its keys. After prompts were
appended, the item that grew is worked minus the keys that receipts of other items already hold.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.encoding import BLOCK, INT8
from common.errors import BadUsage, Corrupt
from common.extents import CRC_BYTES
from common.manifest import MAX_RECORDS
from common.record import POINT_FIELDS, item_id, record_key
from common.shards import MOVED, ShardSet
from common.shards_zarr import ALIGNMENT
from harvest.config import HarvestConfig
from harvest.images import read_pictures
from harvest.prompts import MOVED_EVERY, Wish, read_prompts, seed_of
from harvest.quarantine import notes_that_count
from harvest.running.slices import WHOLE, Slice
from harvest.teacher import TeacherFacts

SHARD_BYTES = 256_000_000
"""Of a shard, where the configuration does not say how many records it holds."""
ORDER_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One record to be: what the teacher will be asked."""

    key: str
    prompt: str
    seed: int
    picture: str = ""
    """Its name, with source images."""


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
    summary: str
    """Of the prompts."""

    @property
    def sizes(self) -> set[tuple[int, int]]:
        return {(item.height, item.width) for item in self.items}

    @property
    def num_records(self) -> int:
        return sum(len(item.questions) for item in self.items)

    def is_done(self, shards: ShardSet, moved: Callable[[], object] = lambda: None) -> bool:
        return next(self.remaining(shards, moved=moved), None) is None

    def remaining(self, shards: ShardSet, part: Slice = WHOLE, moved: Callable[[], object] = lambda: None
                  ) -> Iterator[WorkItem]:  # fmt: skip
        """Items that still need work, shuffled, so that a set cut short is a fair sample of its prompts; of them the
        share of one worker."""
        manifest = shards.manifest()
        planned = {item.id for item in self.items}
        held = set[str]()
        for receipt in manifest.receipts:
            if receipt.item not in planned:
                held.update(shards.keys(receipt))
                moved()
        elsewhere = moved_keys(shards)
        held |= {key for keys in elsewhere.values() for key in keys}
        held |= {key for note in notes_that_count(shards.path, manifest) for key in note.bad_keys}
        for place, index in enumerate(np.random.default_rng(ORDER_SEED).permutation(len(self.items))):
            item = self.items[index]
            if not part.holds(place) or item.id in manifest.by_item or item.id in elsewhere:
                continue
            left = tuple(question for question in item.questions if question.key not in held)
            if left:
                yield replace(item, questions=left)


def make_plan(config: HarvestConfig, facts: TeacherFacts, moved: Callable[[], object] = lambda: None) -> Plan:
    """Prompts and seeds in file order, packed into items of one size each. `moved` hears of each thousand prompts and
    of each picture."""
    wishes, summary, num_seeds = _wishes(config, moved)
    by_size: dict[tuple[int, int], dict[str, Question]] = {}
    for count, wish in enumerate(wishes):
        if count % MOVED_EVERY == 0:
            moved()
        height, width = wish.height or config.height, wish.width or config.width
        if (height, width) not in by_size:
            check_size(height, width, facts, of=f" of prompt {wish.prompt[:60]!r}" if wish.height or wish.width else "")
        numbers = range(num_seeds)
        for seed in [seed_of(wish.prompt, number) for number in numbers] if wish.seed is None else [wish.seed]:
            key = record_key(wish.prompt, seed, height, width)
            question = Question(key=key, prompt=wish.prompt, seed=seed, picture=wish.picture)
            by_size.setdefault((height, width), {}).setdefault(key, question)
    items = tuple(
        WorkItem(questions=tuple(questions[start : start + per_shard]), height=height, width=width)
        for (height, width), by_key in by_size.items()
        for questions, per_shard in [(list(by_key.values()), records_per_shard(config, facts, height, width))]
        for start in range(0, len(questions), per_shard)
    )
    return Plan(items=items, summary=summary)


def _wishes(config: HarvestConfig, moved: Callable[[], object]) -> tuple[list[Wish], str, int]:
    """With one line about them, and how many seeds each of them has where it names none."""
    if config.images is not None:
        return *read_pictures(config.images, moved), 1
    assert config.prompts is not None, "the configuration has one of the two"
    return *read_prompts(config.prompts.file, limit=config.prompts.limit, moved=moved), config.prompts.seeds_per_prompt


def records_per_shard(config: HarvestConfig, facts: TeacherFacts, height: int, width: int) -> int:
    chosen = config.records_per_shard or SHARD_BYTES // record_bytes(config, facts, height, width)
    return min(max(1, chosen), MAX_RECORDS)


def record_bytes(config: HarvestConfig, facts: TeacherFacts, height: int, width: int) -> int:
    """Of the arrays of one record, its text left out."""
    side = facts.latent_stride
    state = facts.latent_channels * (height // side) * (width // side)
    num_fields = len(POINT_FIELDS[config.branches])
    int8 = 2 * state + (num_fields - 1) * (state + 2 * -(-state // BLOCK))
    point_bytes = {"float16": 2 * num_fields * state, "float32": 4 * num_fields * state, INT8: int8}[config.encoding]
    if config.container == "zarr":
        point_bytes = -(-(point_bytes + CRC_BYTES) // ALIGNMENT) * ALIGNMENT
    return config.keep * point_bytes + state * (4 if config.encoding == "float32" else 2)


def check_size(height: int, width: int, facts: TeacherFacts, of: str = "") -> None:
    unit = facts.latent_stride * facts.latent_patch
    for name, size in (("height", height), ("width", width)):
        if size < 1 or size % unit:
            below = max(unit, size // unit * unit)
            raise BadUsage(
                wrong=f"{name}{of} does not divide by {unit}",
                found=f"{size}, with stride {facts.latent_stride} and patch {facts.latent_patch}",
                mend=f"take {below} or {below + unit}",
            )


def moved_keys(shards: ShardSet) -> dict[str, list[str]]:
    """Items that were carried elsewhere to free the disk, and their keys: done, though not here."""
    return {path.stem: keys_of_moved(path) for path in (shards.path / MOVED).glob("[!.]*.json")}


def keys_of_moved(path: Path) -> list[str]:
    try:
        keys: list[str] = json.loads(path.read_bytes())["keys"]
        if item_id(keys) != path.stem:
            raise ValueError("the keys in it are others than those of its item")
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(wrong=f"note {MOVED}/{path.name} is damaged", found=str(error),
                      mend="copy it again; or remove it, and its item is harvested again") from None  # fmt: skip
    return keys
