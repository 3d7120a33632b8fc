"""Thin adapters, one module per family of teachers, chosen by the class in model_index.json.

    facts = facts_of(resolved)                               from the folder's JSON files; no weight is read
    placement_of(config, resolved, work).lines()             where its networks would go on this machine
    teacher = load_teacher(config, resolved, watch, log, work)     see harvest/teacher.py for what it can do

An adapter is `facts_of`, `load_teacher`, `networks_of` (names, in the order in which they are needed), `needs_of`,
and a class that implements harvest.teacher.Teacher.
"""

import importlib
import time
from typing import Any

from common.errors import Refused
from common.log import Log, human_seconds
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
    if config.compile:
        warm_up(teacher, work, watch, log)
    return teacher


def placement_of(config: TeacherConfig, resolved: Resolved, work: Work) -> Placement:
    """From the headers of its files and what is free now; Refused where it does not fit."""
    from harvest.loading.kernels import require_compilable
    from harvest.loading.measure import machine_at_hand, sizes_of, vae_sizes, wish_of
    from harvest.loading.parts import choose_dtype
    from harvest.placing.placement import place

    adapter, dtype = _adapter(resolved), choose_dtype(config.dtype, config.device)
    sizes = sizes_of(resolved, adapter.networks_of(resolved), dtype)
    needs = adapter.needs_of(config, resolved, work, dtype)
    sizes += vae_sizes(resolved, needs)
    placement = place(sizes, machine_at_hand(config.device), wish_of(config, needs))
    require_compilable(config, placement)
    return placement


def warm_up(teacher: Teacher, work: Work, watch: Watch, log: Log) -> None:
    """One step on each side of the boundary: what is compiled is compiled before anybody counts seconds."""
    import torch
    import torch._dynamo.exc
    from torch._inductor.exc import InductorError

    facts, began = teacher.facts, time.monotonic()
    (text,) = teacher.encode([""])
    condition = teacher.condition([text] * work.records, text)
    shape = (facts.latent_channels, work.height // facts.latent_stride, work.width // facts.latent_stride)
    for t in (facts.train_steps - 1.0, 1.0):
        watch.moved(compiling=f"t={t:g}")
        try:
            teacher.predict(torch.zeros(work.records, *shape), torch.full((work.records,), t), condition)[0].cpu()
        except (torch._dynamo.exc.TorchDynamoException, InductorError) as error:
            raise Refused(
                wrong="the teacher's blocks cannot be compiled here",
                found=str(error).split("\n")[0],
                mend="set teacher.compile: false, or install a C++ compiler (for a GPU: triton)",
            ) from error
    log.say(f"compiled and warmed up in {human_seconds(time.monotonic() - began)}")


def _adapter(resolved: Resolved) -> Any:
    if resolved.pipeline not in ADAPTERS:
        raise Refused(
            wrong="no teacher of this kind is known",
            found=f"{resolved.pipeline} in {resolved.folder / MODEL_INDEX}",
            mend=f"use one of {', '.join(ADAPTERS)}, or write an adapter in harvest/teachers/",
        )
    return importlib.import_module(ADAPTERS[resolved.pipeline])
