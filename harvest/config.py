"""What a harvest can be told. configs/harvest/ holds complete, commented files.

What the teacher's folder says of itself (boundary, channels, patch, latent scaling) is read from it, never told here.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from common.config import Section

NUM_SEGMENTS = 4
"""Whose edges are kept where nothing else is said."""
PLACEMENTS = ("auto", "replicate", "swap", "balanced", "stream", "gpu0", "cpu")


class TeacherConfig(Section):
    folder: Path
    """A diffusers folder with a model_index.json, or the experts in Wan's original layout."""
    rest: Path | None = None
    """With the original layout: the diffusers folder that gives text encoder, tokenizer, VAE and scheduler."""
    variant: Literal["auto", "fp16", "none"] = "auto"
    """Which weight files are read; auto: the fp16 ones of a component that has them."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What is computed in; modules that a model keeps in float32 stay so."""
    prepared: Path | None = None
    """Where the weights are kept converted (`python -m harvest prepare`); made there if need be, used when fresh."""
    broadcast: bool = False
    """Of the workers that this machine starts together one reads the weights, and the others' GPUs receive them from
    its own: for GPUs that share a link to the host. Networks that take turns are read by each."""
    rehash: bool = False
    """Take the fingerprint from the weights' bytes again, not from what was written down of these very files."""
    device: str = "auto"
    placement: str | dict[str, str] = "auto"
    """auto, replicate, swap, balanced, stream, gpu0, cpu (docs/placement.md), a map of modules to devices, or the
    .json file that holds one."""
    text_encoder: Literal["auto", "gpu", "cpu"] = "auto"
    """Where prompts are encoded; auto: on the GPU where it fits, if only for as long as it encodes."""
    memory_budget: float = Field(default=0.9, gt=0, le=1)
    """Of what is free when the teacher is loaded: never more is planned for, nor given by the GPU's allocator."""
    threads: PositiveInt | None = None
    """Of the CPU; None: as torch has it."""
    batched_guidance: bool = True
    """cond and uncond in one forward."""
    collapsed_padding: bool = True
    """Padding rows are equal, so two keys with a bias stand for all of them; and the texts' keys and values, which do
    not depend on the timestep, are computed once a micro-batch. Exact but for rounding; off for proofs."""
    attention: Literal["auto", "math", "flash", "efficient", "cudnn"] = "auto"
    """Which of torch's kernels compute it; auto: torch's own choice, which the numerics name."""
    compile: bool = False
    """The experts' repeated block by torch.compile, a shape at a time: minutes at the beginning, each forward faster.
    For networks that stay whole on one device."""

    @field_validator("placement")
    @classmethod
    def _is_a_way(cls, value: str | dict[str, str]) -> str | dict[str, str]:
        if isinstance(value, str) and value not in PLACEMENTS and not value.endswith(".json"):
            raise ValueError(f"use one of {', '.join(PLACEMENTS)}, a map of modules to devices, or a .json file of one")
        return value


class PromptsConfig(Section):
    file: Path
    limit: PositiveInt | None = None
    seeds_per_prompt: PositiveInt = 1


class ImagesConfig(Section):
    path: Path
    """A folder, a .jsonl manifest or WebDataset .tar files: what they look like stands in harvest/images.py."""
    frame: NonNegativeInt | None = None
    """Of animated pictures; None: they are refused."""


class HarvestConfig(Section):
    out: Path
    """The set: a folder, made if need be."""
    teacher: TeacherConfig
    prompts: PromptsConfig | None = None
    """None with source images, which brings its captions."""
    images: ImagesConfig | None = None
    """With source images alone."""
    samples: tuple[str, ...] = ()
    """Prompts that training looks at while it learns: drawn first, left in the set's assets (harvest/samples.py)."""
    height: PositiveInt = 512
    width: PositiveInt = 512
    steps: PositiveInt = 40
    """Walked by the solver."""
    keep: PositiveInt = 8
    """Of the steps, stored."""
    keep_at: tuple[int, ...] | None = None
    """Steps that every record keeps; None: the first one and, where more than four are kept, the edges of four equal
    segments, so that few-step students can be trained on them."""
    source: Literal["trajectory", "renoise", "images"] = "trajectory"
    """renoise: the walk's end point under fresh noise at the kept levels, the teacher asked again there; images: the
    same with pictures of one's own as end points."""
    solver: Literal["euler", "checkpoint"] = "euler"
    """checkpoint: the scheduler that the folder brings, with its own grid."""
    jitter: bool = True
    """Each record walks its own noise levels, drawn within the strata of the grid."""
    shift: float | None = Field(default=None, gt=0)
    """Of the noise levels; None: the folder's own."""
    guidance: tuple[float, ...] = (4.0, 3.0)
    """Per expert, the high-noise one first."""
    negative_prompt: str = ""
    latent_dtype: Literal["float16", "float32"] = "float16"
    encoding: Literal["float16", "float32", "int8-block64"] = "float16"
    """int8-block64: two thirds of the bytes, at 0.6 % error of the guided prediction."""
    branches: Literal["both", "guided"] = "both"
    """What is kept of each answer. both: cond and uncond; guided: their combination at `guidance` alone, in two thirds
    of the bytes: training can then take no other w."""
    container: Literal["zarr", "tar"] = "zarr"
    micro_batch: PositiveInt = 4
    """Records in one forward: part of the numerics, so it is never changed while running."""
    records_per_shard: PositiveInt | None = None
    """None: as many as fit into 256 MB."""
    workers: PositiveInt | None = None
    """Processes on this machine; None: one per GPU, one on a CPU. Under torchrun or srun: theirs."""
    max_quarantined: float = Field(default=0.05, ge=0, le=1)
    """Share of records that may be set aside (not finite, constant, exploding) before a worker stops."""
    on_event: str | None = None
    """A shell command for stall, quarantine, retired and done: HARVEST_EVENT and HARVEST_FACTS say which and what."""
    deadline_s: float = Field(default=600.0, gt=0)
    """A stage that does not move for so long is reported with every thread's stack."""

    @model_validator(mode="after")
    def _keeps_what_it_walks(self) -> Self:
        if self.keep > self.steps:
            raise ValueError(f"keep ({self.keep}) is more than steps ({self.steps}): keep at most all of them")
        pinned = self.pinned_steps
        if any(not 0 <= step < self.steps for step in pinned) or len(pinned) > self.keep:
            raise ValueError(f"keep_at {pinned}: name at most {self.keep} steps from 0 to {self.steps - 1}")
        if self.latent_dtype == "float32" and self.encoding != "float32":
            raise ValueError("latent_dtype float32 is stored whole: set encoding: float32 too")
        if self.solver == "checkpoint" and self.jitter:
            raise ValueError("solver checkpoint walks the folder's own grid: set jitter: false")
        return self

    @model_validator(mode="after")
    def _knows_what_to_ask(self) -> Self:
        if self.source == "images":
            if self.images is None or self.prompts is not None:
                raise ValueError("source images brings its own captions: set images.path, and prompts: null")
        elif self.prompts is None or self.images is not None:
            raise ValueError(f"source {self.source} takes prompts alone: set prompts.file, and images: null")
        return self

    @property
    def pinned_steps(self) -> tuple[int, ...]:
        if self.keep_at is not None:
            return self.keep_at
        num_segments = NUM_SEGMENTS if self.keep > NUM_SEGMENTS else 1
        return tuple(number * self.steps // num_segments for number in range(num_segments))
