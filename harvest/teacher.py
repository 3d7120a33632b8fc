"""What the harvest wants of a teacher, and who answers.

    resolved = resolve(folder, variant)                  nothing of a model is read yet
    teacher = load_teacher(config.teacher, resolved, watch, log)
    texts = teacher.encode(["a small star ..."])         one [L, D] each
    condition = teacher.condition(texts, negative)       once per micro-batch
    cond, uncond = teacher.predict(latents, timesteps, condition)

A foreign model is one thin adapter under teachers/, chosen by the class in model_index.json.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common.errors import Refused
from common.log import Log
from common.watch import Watch
from harvest.config import TeacherConfig
from harvest.folder import Resolved

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherFacts:
    """The teacher's share of the contract, read from its folder. Names as in common.record.Contract."""

    teacher: str
    text_length: int
    text_padding: str
    text_dim: int
    prediction: str
    noise: str
    train_steps: int
    shift: float
    """The folder's own."""
    boundary: float | None
    latent_channels: int
    latent_stride: int
    latent_patch: int
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprints:
    """What was loaded, by content."""

    weights: str
    text_encoder: str
    tokenizer: str


class Teacher(Protocol):
    """A loaded teacher. Which expert serves a timestep is its own business."""

    facts: TeacherFacts
    fingerprints: Fingerprints
    compute_dtype: str
    device: str
    attention: str

    def encode(self, prompts: list[str]) -> "list[Tensor]":
        """Each prompt's rows [L, D] on the CPU in float32, each computed alone, so that neighbours never matter."""

    def condition(self, texts: "list[Tensor]", negative: "Tensor") -> Any:
        """What `predict` wants of B texts and the negative one; made once for all steps of a micro-batch."""

    def predict(self, latents: "Tensor", timesteps: "Tensor", condition: Any) -> "tuple[Tensor, Tensor]":
        """cond and uncond [B, C, H, W] in float32 at `latents` [B, C, H, W] and `timesteps` [B]."""


def facts_of(resolved: Resolved) -> TeacherFacts:
    """What a folder says of its teacher, without reading a weight."""
    facts: TeacherFacts = _adapter(resolved).facts_of(resolved)
    return facts


def load_teacher(config: TeacherConfig, resolved: Resolved, watch: Watch, log: Log) -> Teacher:
    teacher: Teacher = _adapter(resolved).load(config, resolved, watch, log)
    return teacher


def _adapter(resolved: Resolved) -> Any:
    from harvest.teachers import sd, wan

    adapters = {"WanPipeline": wan, "StableDiffusionPipeline": sd}
    if resolved.pipeline not in adapters:
        raise Refused(
            wrong="no teacher of this kind is known",
            found=f"{resolved.pipeline} in {Path(resolved.folder) / 'model_index.json'}",
            mend=f"use one of {', '.join(adapters)}, or write an adapter in harvest/teachers/",
        )
    return adapters[resolved.pipeline]
