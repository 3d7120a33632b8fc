"""What the harvest wants of a teacher.

    texts = teacher.encode(["a small star ..."])         one [L, D] each
    condition = teacher.condition(texts, negative)       once per micro-batch
    cond, uncond = teacher.predict(latents, timesteps, condition)

A foreign model is one thin adapter under teachers/.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from harvest.config import HarvestConfig

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
    scheduler: str
    """The folder's own: its class, then its settings as JSON. In the contract where it is the solver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprints:
    """What was loaded, by content."""

    weights: str
    text_encoder: str
    tokenizer: str
    vae: str = ""
    """Where pictures are encoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The largest forward that will be asked for: what must fit beside the weights."""

    records: int = 4
    height: int = 512
    width: int = 512
    pictures: bool = False
    """Pictures are encoded too, by the folder's VAE."""


def work_of(config: HarvestConfig, sizes: Collection[tuple[int, int]] = ()) -> Work:
    """`sizes`: (height, width) of what is planned; prompts may bring their own, the largest decides."""
    height, width = max(sizes or [(config.height, config.width)], key=lambda size: size[0] * size[1])
    return Work(records=config.micro_batch, height=height, width=width, pictures=config.images is not None)


class ExpertListener(Protocol):
    """See harvest/activations.py."""

    def attend(self, name: str, expert: Any) -> None: ...

    def close(self) -> None: ...


class Teacher(Protocol):
    """A loaded teacher. Which expert serves a timestep is its own business."""

    facts: TeacherFacts
    fingerprints: Fingerprints
    compute_dtype: str
    device: str
    encoder_device: str
    attention: str
    sdpa: str
    """Kernels of its attention: see harvest/loading/kernels.py."""
    in_flight: int
    """Micro-batches to walk side by side, so that no device waits: one for each that an expert is split over."""
    listener: "ExpertListener | None"
    """Is told of each expert before its forwards, where a teacher has blocks that a student is cut from."""

    def encode(self, prompts: list[str]) -> "list[Tensor]":
        """Each prompt's rows [L, D] on the CPU in float32, each computed alone, so that neighbours never matter."""

    def make_room(self) -> None:
        """What takes turns on the device leaves it: somebody else is to work there."""

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """Of each prompt, before anything is cut at `facts.text_length`."""

    def condition(self, texts: "list[Tensor]", negative: "Tensor") -> Any:
        """What `predict` wants of B texts and the negative one; made once for all steps of a micro-batch."""

    def predict(self, latents: "Tensor", timesteps: "Tensor", condition: Any) -> "tuple[Tensor, Tensor]":
        """cond and uncond [B, C, H, W] in float32 at `latents` [B, C, H, W] and `timesteps` [B]."""
