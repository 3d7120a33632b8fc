"""A checkpoint with everything that its exported forms must say.

    finished = read_finished(run_or_checkpoint, averaged=True, license_name="apache-2.0")
    finished = at_one_guidance(finished, 3.0)       of a student that is told the guidance: one w, baked in

Adapters are merged into the weights, and stand beside them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from common.errors import BadUsage
from common.record import Contract
from common.shards import ASSETS
from train.card import card, code_version
from train.config import Lora
from train.guidance import refuse_guidance
from train.objective import Objective, objective_of
from train.opened import open_checkpoint
from train.run_folder import EMA_NAME, MODEL_NAME
from train.student.guidance import at_one
from train.student.network import StudentConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A checkpoint with everything that its forms must say."""

    student: StudentConfig
    weights: dict[str, Tensor]
    adapters: dict[str, Tensor]
    """Of a run with `lora`; they are in the weights already."""
    lora: Lora | None
    contract: Contract
    assets_dir: Path
    objective: Objective
    provenance: dict[str, str]

    def card(self, use: str) -> str:
        return card(self.student, self.contract, use, self.provenance)


def read_finished(source: Path, *, averaged: bool, license_name: str) -> Finished:
    opened = open_checkpoint(source, EMA_NAME if averaged else MODEL_NAME)
    config, contract, summary = opened.config, opened.shards.contract, opened.summary
    provenance = {
        "made_by": code_version(),
        "teacher": contract.teacher,
        "teacher_weights": contract.weights,
        "contract": contract.digest(),
        "objective": config.objective,
        "averaged": "yes" if averaged else "no",
        "steps": str(summary["step"]),
        "samples_seen": str(summary["samples_seen"]),
        "license": license_name,
        **({} if config.lora is None else {"lora": f"rank {config.lora.rank}", "base": f"sha256 {summary['base']}"}),
    }
    return Finished(
        student=opened.student,
        weights=opened.weights,
        adapters={} if config.lora is None else opened.saved,
        lora=config.lora,
        contract=contract,
        assets_dir=opened.shards.path / ASSETS,
        objective=objective_of(config, contract),
        provenance=provenance,
    )


def at_one_guidance(finished: Finished, guidance: float | None) -> Finished:
    drawn = finished.objective.drawn
    if drawn is None:
        refuse_guidance(guidance)
        return finished
    own = set(finished.contract.guidance)
    if guidance is None and len(own) > 1:
        raise BadUsage(wrong="this form holds one guidance", found=f"the set's own are {sorted(own)}",
                       mend="--guidance W, or --format wanlite, which keeps the input")  # fmt: skip
    w = own.pop() if guidance is None else guidance
    drawn.require(w)
    student, weights = at_one(finished.student, finished.weights, w)
    provenance = finished.provenance | {"guidance": f"{w:g}, baked in"}
    return dataclasses.replace(finished, student=student, weights=weights, provenance=provenance)


def with_time(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The patch kernel gets its time axis back, of length one: the reverse of train.student.projection.strip."""
    return {
        name: tensor.unsqueeze(2) if name == "patch_embedding.weight" else tensor for name, tensor in weights.items()
    }
