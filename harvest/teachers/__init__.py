"""Thin adapters, one module per family of teachers, chosen by the class in model_index.json.

    facts = facts_of(resolved)                               from the folder's JSON files; no weight is read
    teacher = load_teacher(config, resolved, watch, log)     see harvest/teacher.py for what it can do

An adapter is two functions of these names and a class that implements harvest.teacher.Teacher.
"""

import importlib
from typing import Any

from common.errors import Refused
from common.log import Log
from common.watch import Watch
from harvest.config import TeacherConfig
from harvest.folder import MODEL_INDEX, Resolved
from harvest.teacher import Teacher, TeacherFacts

ADAPTERS = {"WanPipeline": "harvest.teachers.wan", "StableDiffusionPipeline": "harvest.teachers.sd"}


def facts_of(resolved: Resolved) -> TeacherFacts:
    facts: TeacherFacts = _adapter(resolved).facts_of(resolved)
    return facts


def load_teacher(config: TeacherConfig, resolved: Resolved, watch: Watch, log: Log) -> Teacher:
    teacher: Teacher = _adapter(resolved).load_teacher(config, resolved, watch, log)
    return teacher


def _adapter(resolved: Resolved) -> Any:
    if resolved.pipeline not in ADAPTERS:
        raise Refused(
            wrong="no teacher of this kind is known",
            found=f"{resolved.pipeline} in {resolved.folder / MODEL_INDEX}",
            mend=f"use one of {', '.join(ADAPTERS)}, or write an adapter in harvest/teachers/",
        )
    return importlib.import_module(ADAPTERS[resolved.pipeline])
