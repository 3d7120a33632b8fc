"""Thin adapters, one module per family of teachers, chosen by the class in model_index.json.

    facts = facts_of(resolved)                               from the folder's JSON files; no weight is read
    placement_of(config, resolved, work).lines()             where its networks would go on this machine
    teacher = load_teacher(config, resolved, watch, log, work)     see harvest/teacher.py for what it can do

An adapter is `facts_of`, `load_teacher`, `networks_of` (names, in the order in which they are needed), `work_bytes`,
and a class that implements harvest.teacher.Teacher.
"""

import importlib
from typing import Any

from common.errors import Refused
from common.log import Log
from common.watch import Watch
from harvest.config import TeacherConfig
from harvest.loading.folder import MODEL_INDEX, Resolved
from harvest.placing.places import Placement
from harvest.teacher import Teacher, TeacherFacts, Work

ONE_BATCH = Work()
ADAPTERS = {"WanPipeline": "harvest.teachers.wan", "StableDiffusionPipeline": "harvest.teachers.sd"}


def facts_of(resolved: Resolved) -> TeacherFacts:
    facts: TeacherFacts = _adapter(resolved).facts_of(resolved)
    return facts


def load_teacher(config: TeacherConfig, resolved: Resolved, watch: Watch, log: Log, work: Work = ONE_BATCH) -> Teacher:
    teacher: Teacher = _adapter(resolved).load_teacher(config, resolved, watch, log, work)
    return teacher


def placement_of(config: TeacherConfig, resolved: Resolved, work: Work) -> Placement:
    """From the headers of its files and what is free now; Refused where it does not fit."""
    from harvest.loading.measure import machine_at_hand, sizes_of, wish_of
    from harvest.loading.parts import choose_dtype
    from harvest.placing.placement import place

    adapter, dtype = _adapter(resolved), choose_dtype(config.dtype, config.device)
    sizes = sizes_of(resolved, adapter.networks_of(resolved), dtype)
    work_bytes = adapter.work_bytes(config, resolved, work, dtype)
    return place(sizes, machine_at_hand(config.device), wish_of(config, work_bytes))


def _adapter(resolved: Resolved) -> Any:
    if resolved.pipeline not in ADAPTERS:
        raise Refused(
            wrong="no teacher of this kind is known",
            found=f"{resolved.pipeline} in {resolved.folder / MODEL_INDEX}",
            mend=f"use one of {', '.join(ADAPTERS)}, or write an adapter in harvest/teachers/",
        )
    return importlib.import_module(ADAPTERS[resolved.pipeline])
