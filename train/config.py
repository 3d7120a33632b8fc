"""What a training run can be told. configs/train/ holds complete, commented files.

What the set says of itself (channels, text, guidance, shift) is read from it, never told here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from common.config import Section


def lies_in(name: str, part: str) -> bool:
    """Whether a parameter is this one, or belongs to this part of a student: in blocks.1, not in blocks.10."""
    return name == part or name.startswith(part.rstrip(".") + ".")


class Lora(Section):
    """Low-rank adapters (Hu et al. 2106.09685) beside some linear layers; nothing else is trained."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 16.0
    """The adapters' answer counts alpha / rank."""
    targets: tuple[str, ...] = Field(default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1)
    """Ends of layers' names, whole words of them: to_q is blocks.0.attn1.to_q and all others."""

    def adapts(self, layer: str) -> bool:
        return any(layer == target or layer.endswith(f".{target}") for target in self.targets)


class MuonConfig(Section):
    """The matrices of the blocks and of what they are conditioned on move by their momentum made orthogonal
    (train/muon.py): as far in all directions, however few carried the gradient."""

    lr: float = Field(gt=0)
    """On the scale of `lr`, which is AdamW's (Liu et al. 2502.16982, 2.2); four times that was best on small ones."""
    momentum: float = Field(default=0.9, ge=0, lt=1)

    def moves(self, name: str, shape: Sequence[int]) -> bool:
        return len(shape) == 2 and name.startswith(("blocks.", "condition_embedder."))


class GuidanceRange(Section):
    """For a student that is told w."""

    low: float = Field(ge=0)
    high: float

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.high <= self.low:
            raise ValueError(f"high must be larger than low ({self.low:g})")
        return self


def _kind_of_guidance(value: Any) -> str:
    return "drawn" if isinstance(value, dict | GuidanceRange) else "fixed"


Guidance = Annotated[
    Annotated[tuple[float, ...], Tag("fixed")] | Annotated[GuidanceRange, Tag("drawn")],
    Discriminator(_kind_of_guidance),
]


class TrainConfig(Section):
    set: Path
    """The shard set; partial is fine, what is committed at an epoch's start is that epoch."""
    init: Path
    """What `python -m train init` wrote."""
    out: Path
    """The run: epochs, checkpoints, metrics, pictures."""
    num_epochs: float = Field(default=10, gt=0)
    """Length of the run in passes over what the set holds at its start."""
    objective: Literal["output", "segment"] = "output"
    """See train/objective.py."""
    segments: PositiveInt | None = None
    """Of objective: segment, and the steps of the student's walk; None: one from each stored point to the next."""
    batch_size: PositiveInt = 32
    """Per process and forward."""
    global_batch: PositiveInt | None = None
    """Samples per optimizer step over all processes; None: batch_size x processes, at the run's first start."""
    lr: float = Field(default=1e-3, gt=0)
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 50
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    muon: MuonConfig | None = None
    """What is not moved so, and without this everything, moves by AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    ema_on_host: bool = False
    """The moving average in the memory of the CPU: the price is one copy of the weights a step."""
    guidance: Guidance | None = None
    """w of the target uncond + w (cond - uncond), per expert; None: the set's own, which is all that a set of branches:
    guided has; 1: no guidance. {low, high}: drawn for each sample, and the student is told; at one w it is a plain
    student again (train export --guidance)."""
    level_shares: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] | None = None
    """Of the loss, for the four quarters of sigma from low to high; None: as the harvest put its points."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the forward; weights, optimizer and EMA are float32. float16 scales the loss."""
    gradient_checkpointing: bool = False
    """Blocks are computed again in the backward pass: a third more time for much less memory."""
    sharded_optimizer: bool = False
    """Each process holds the optimizer's moments of its part of the parameters; checkpoints are the same."""
    compile: bool = False
    """torch.compile of the student."""
    frozen: tuple[str, ...] = ()
    """Parameters, or parts of the student with all that is in them (blocks.1), stay as they are."""
    lora: Lora | None = None
    """Wants the extra `lora`. Checkpoints hold the adapters alone: the init stays part of the run."""
    fit: Literal["exact", "auto"] = "exact"
    """auto: a batch_size that does not fit the memory is halved, at the same global batch."""
    seed: int = 0
    """Of the sample order."""
    checkpoint_every: PositiveInt = 500
    """Steps."""
    keep_checkpoints: PositiveInt = 2
    """The newest ones."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of so many steps are kept for ever."""
    save_samples: bool = False
    """Pictures while it trains, each beside its teacher's own."""
    sample_interval: PositiveInt = 1
    """Epochs between them."""
    sample_dir: Path | None = None
    """None: `samples` in the run."""
    sample_prompts: tuple[str, ...] | None = None
    """Prompts that the set holds; None: its first held-out ones."""
    log_every: PositiveInt = 20
    tensorboard: bool = False
    """Events of the numbers in metrics.jsonl, under OUT/tensorboard; wants the extra `tensorboard`."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """auto: the GPUs that are visible, else the CPU; cpu | cuda | cuda:N."""
    processes: PositiveInt | None = None
    """Started by `train run` itself, one per GPU; None: all visible GPUs, or one on a CPU."""
    threads: PositiveInt | None = None
    reader: Literal["offset", "library"] = "offset"
    """library: through zarr-python and tarfile, slowly; archives are always read so."""
    read_workers: NonNegativeInt = 0
    """Processes that read ahead, per training process; 0: a thread of its own."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """skip: a good sample of the same micro-batch takes the place of a damaged one; counted and said."""
    deadline_s: float = Field(default=300.0, gt=0)
    """A stage that does not move for so long is reported with every thread's stack."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.level_shares is not None and sum(self.level_shares) == 0:
            raise ValueError("level_shares: all are 0; give at least one level a share of the loss, or null")
        if self.guidance == ():
            raise ValueError("guidance: give a number for each expert, or null for the set's own")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {list(self.betas)} must lie in 0 <= beta < 1")
        return self

    def by_muon(self, name: str, shape: Sequence[int]) -> bool:
        """Whether this parameter moves so; else AdamW moves it."""
        return self.muon is not None and self.muon.moves(name, shape)
