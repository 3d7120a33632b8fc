"""What a harvest can be told. configs/harvest/ holds complete, commented files.

What the teacher's folder says of itself (boundary, channels, patch, latent scaling) is read from it, never told here.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from common.config import Section


class TeacherConfig(Section):
    folder: Path
    """A diffusers folder with a model_index.json."""
    variant: Literal["auto", "fp16", "none"] = "auto"
    """Which weight files are read; auto: the fp16 ones of a component that has them."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What is computed in; modules that a model keeps in float32 stay so."""
    prepared: Path | None = None
    """Where the weights are kept converted (`python -m harvest prepare`); made there if need be, used when fresh."""
    rehash: bool = False
    """Take a prepared teacher's fingerprint from its bytes again, not from what was written down while preparing."""
    device: str = "auto"
    threads: PositiveInt | None = None
    """Of the CPU; None: as torch has it."""
    batched_guidance: bool = True
    """cond and uncond in one forward."""
    collapsed_padding: bool = True
    """Padding rows are equal, so two keys with a bias stand for all of them; and the texts' keys and values, which do
    not depend on the timestep, are computed once a micro-batch. Exact but for rounding; off for proofs."""


class PromptsConfig(Section):
    file: Path
    limit: PositiveInt | None = None
    seeds_per_prompt: PositiveInt = 1


class HarvestConfig(Section):
    out: Path
    """The set: a folder, made if need be."""
    teacher: TeacherConfig
    prompts: PromptsConfig
    height: PositiveInt = 512
    width: PositiveInt = 512
    steps: PositiveInt = 40
    """Walked by the solver."""
    keep: PositiveInt = 8
    """Of the steps, stored."""
    keep_at: tuple[int, ...] = (0,)
    """Steps that every record keeps."""
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
    container: Literal["zarr", "tar"] = "zarr"
    micro_batch: PositiveInt = 4
    """Records in one forward: part of the numerics, so it is never changed while running."""
    records_per_shard: PositiveInt | None = None
    """None: as many as fit into 256 MB."""
    deadline_s: float = Field(default=600.0, gt=0)
    """A stage that does not move for so long is reported with every thread's stack."""

    @model_validator(mode="after")
    def _keeps_what_it_walks(self) -> Self:
        if self.keep > self.steps:
            raise ValueError(f"keep ({self.keep}) is more than steps ({self.steps}): keep at most all of them")
        if any(not 0 <= step < self.steps for step in self.keep_at) or len(self.keep_at) > self.keep:
            raise ValueError(f"keep_at {self.keep_at}: name at most {self.keep} steps from 0 to {self.steps - 1}")
        if self.latent_dtype == "float32" and self.encoding != "float32":
            raise ValueError("latent_dtype float32 is stored whole: set encoding: float32 too")
        return self
