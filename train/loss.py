"""What the student is asked to match, and how far off it is.

    target = guided(cond, uncond, expert, w)                 uncond + w (cond - uncond), w per expert
    loss, per_sample = velocity_loss(student(...), target)

An objective is a function of a micro-batch and the student; a new one stands beside `output_loss`.
"""

import torch
from torch import Tensor, nn

from train.data import Micro

NUM_LEVELS = 4
"""Bins of sigma in which the loss is logged."""


def guided(cond: Tensor, uncond: Tensor, expert: Tensor, guidance: Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2207.12598, eq. 6) with the w of each sample's expert."""
    w = guidance[expert].view(-1, 1, 1, 1)
    return uncond + w * (cond - uncond)


def output_loss(student: nn.Module, micro: Micro, guidance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error against the teacher's guided prediction at the stored point; also per sample [B]."""
    target = guided(micro.cond.float(), micro.uncond.float(), micro.expert, guidance)
    text, lengths = micro.text.float()[micro.inverse], micro.lengths[micro.inverse]
    predicted = student(micro.latents.float(), micro.timesteps, text, lengths).float()
    per_sample = (predicted - target).square().mean(dim=(1, 2, 3))
    return per_sample.mean(), per_sample.detach()


def level_sums(sigmas: Tensor, per_sample: Tensor) -> Tensor:
    """[2, NUM_LEVELS]: sums and counts of the loss per bin of sigma; they add up over micro-batches and ranks."""
    level = (sigmas * NUM_LEVELS).long().clamp(0, NUM_LEVELS - 1)
    sums = torch.zeros(2, NUM_LEVELS, device=sigmas.device, dtype=torch.float64)
    sums[0].index_add_(0, level, per_sample.double())
    sums[1].index_add_(0, level, torch.ones_like(per_sample, dtype=torch.float64))
    return sums
