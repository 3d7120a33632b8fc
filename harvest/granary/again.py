"""The teacher asked again, for records that a set holds or should hold.

    with asked_again(config, set_dir) as asked:
        for record in asked.records({key, ...}): ...      as they were walked the first time

A record is a function of its micro-batch: whole micro-batches are walked again, put together as they were.
"""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import Refused
from common.log import Log
from common.record import Numerics, Record
from common.shards import ShardSet
from common.stop import StopRequest
from harvest.config import HarvestConfig
from harvest.meaning import make_contract, make_numerics
from harvest.plan import Question, WorkItem
from harvest.quarantine import notes_of
from harvest.running.events import HarvestWatch
from harvest.running.loop import ready_teacher, watched
from harvest.running.shortage import memory_told
from harvest.running.slices import WHOLE
from harvest.running.task import Task, read_task
from harvest.teacher import Teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A loaded teacher beside the set that it made."""

    task: Task
    shards: ShardSet
    teacher: Teacher
    numerics: Numerics
    watch: HarvestWatch
    log: Log
    pictures: Any
    """harvest.latents.Pictures, with source images."""

    def records(self, keys: Collection[str], items: Collection[WorkItem]) -> Iterator[Record]:
        """Those of `keys`, walked with the neighbours that they had in `items`."""
        from harvest.rollout import rollout

        config = self.task.config
        for item in items:
            batches = whole_batches(item, keys, config.micro_batch)
            with self.watch.stage("denoise", deadline_s=config.deadline_s), memory_told(config, self.task.resolved):
                walked = rollout(self.teacher, batches, self.shards.contract, micro_batch=config.micro_batch,
                                 moved=self.watch.moved, pictures=self.pictures)  # fmt: skip
            yield from (record for record in walked if record.key in keys)


@contextlib.contextmanager
def asked_again(task: Task) -> Iterator[Asked]:
    """The teacher loaded; refused when it is not the one that made the set."""
    config = task.config
    with StopRequest() as stop, watched(config, WHOLE, stop) as (watch, log):
        with watch.stage("load", deadline_s=config.deadline_s), memory_told(config, task.resolved):
            teacher = ready_teacher(task, watch, log)
        shards = ShardSet.open(config.out)
        shards.require(make_contract(config, teacher.facts, teacher.fingerprints, teacher.compute_dtype))
        from harvest.latents import open_pictures

        watch.running()
        pictures = open_pictures(config, shards.contract, task.resolved, teacher, watch.moved, watch.heed)
        yield Asked(task=task, shards=shards, teacher=teacher, numerics=make_numerics(config, teacher), watch=watch,
                    log=log, pictures=pictures)  # fmt: skip


def task_for(config: HarvestConfig, set_dir: Path) -> Task:
    return read_task(config.model_copy(update={"out": set_dir}))


def batches_of(item: WorkItem, micro_batch: int) -> list[tuple[Question, ...]]:
    """As they go through the teacher together."""
    return [item.questions[start : start + micro_batch] for start in range(0, len(item.questions), micro_batch)]


def whole_batches(item: WorkItem, keys: Collection[str], micro_batch: int) -> WorkItem:
    """The micro-batches of an item that hold one of `keys`."""
    wanted = [group for group in batches_of(item, micro_batch) if any(question.key in keys for question in group)]
    return replace(item, questions=tuple(question for group in wanted for question in group))


def walked_as(task: Task, keys: Collection[str], item_id: str) -> tuple[WorkItem, bool]:
    """What was walked when the shard `item_id` with these keys was made, and whether that is known: its planned item,
    or what a note says. Else it is these keys alone, as where the others had been there before: then other bits may
    come back. A part of a merged set, or one whose note was lost, had other neighbours."""
    holders = [item for item in task.plan.items if any(question.key in keys for question in item.questions)]
    if len(holders) != 1 or not set(keys) <= {question.key for question in holders[0].questions}:
        raise Refused(
            wrong=f"shard {item_id} was not made by this plan",
            found=f"its records stand in {len(holders)} of the plan's items",
            mend="give the configuration and the prompts that it was harvested with",
        )
    (holder,) = holders
    if holder.id == item_id:
        return holder, True
    notes = sorted(notes_of(task.config.out), key=lambda note: note.shard != item_id)  # first who names this very shard
    together = next((note.walked for note in notes if set(keys) <= set(note.walked)), None)
    walked = keys if together is None else together
    questions = tuple(question for question in holder.questions if question.key in walked)
    return replace(holder, questions=questions), together is not None
