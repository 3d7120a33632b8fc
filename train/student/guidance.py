"""A student that is told the guidance, from one that is not, and back.

student = hearing(load_student(folder))         it answers as before, whatever w says, until it has learned
config, weights = at_one(config, weights, w)    the same answers at this w, without the input

w enters as the timestep does: sinusoids, two linears, added to the timestep's embedding. The second linear begins at
zero. At one w what is added is one vector, so a bias can hold it.
"""

import dataclasses
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from train.student.layers import TwoLinears, guidance_waves
from train.student.network import StudentConfig, WanLite

PREFIX = "condition_embedder.guidance_embedder."
TIME_BIAS = "condition_embedder.time_embedder.linear_2.bias"


def hearing(student: WanLite) -> WanLite:
    """As it is, if it hears already."""
    if student.config.guidance_embeds:
        return student
    config = dataclasses.replace(student.config, guidance_embeds=True)
    told = WanLite(config, collapse_padding=student.collapse_padding,
                   gradient_checkpointing=student.gradient_checkpointing)  # fmt: skip
    told.load_state_dict(student.state_dict() | _first_weights(told), strict=True)
    return told


@torch.no_grad()
def at_one(config: StudentConfig, weights: Mapping[str, Tensor], w: float) -> tuple[StudentConfig, dict[str, Tensor]]:
    embedder = _embedder(config)
    embedder.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in weights.items() if PREFIX in name})
    added = embedder(guidance_waves(torch.tensor([w]), config.freq_dim))[0]
    rest = {name: tensor for name, tensor in weights.items() if PREFIX not in name}
    return dataclasses.replace(config, guidance_embeds=False), rest | {TIME_BIAS: weights[TIME_BIAS] + added}


def _first_weights(student: WanLite) -> dict[str, Tensor]:
    """By their names alone: all ranks and all starts draw the same."""
    parts = {name: tensor for name, tensor in student.state_dict().items() if name.startswith(PREFIX)}
    drawn = {name: torch.zeros_like(tensor) for name, tensor in parts.items()}
    generator = torch.Generator().manual_seed(zlib.crc32(PREFIX.encode()))
    nn.init.kaiming_uniform_(drawn[f"{PREFIX}linear_1.weight"], nonlinearity="linear", generator=generator)
    return drawn


def _embedder(config: StudentConfig) -> TwoLinears:
    return TwoLinears(config.freq_dim, config.width, nn.SiLU())
