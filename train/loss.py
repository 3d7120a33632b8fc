"""How far off a student's answers are, sample by sample and by noise level.

    per_sample = error_of(student, objective.ask(micro), micro)          [B]: squared error of the velocity
    weights = level_weights(shares, contract, spans)                     [NUM_LEVELS]: a sample's weight

What is asked is train/objective.py's. Noise levels are the NUM_LEVELS equal parts of sigma.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from common.errors import Refused
from common.record import Contract
from common.schedule import contract_grid
from train.feed.data import Micro
from train.feed.slots import Spans
from train.objective import Question

NUM_LEVELS = 4
NUM_GRIDS = 2048


def error_of(student: Callable[..., Tensor], question: Question, micro: Micro) -> Tensor:
    """[B]"""
    text, lengths = micro.text.float()[micro.inverse], micro.lengths[micro.inverse]
    told = () if question.guidance is None else (question.guidance,)
    answer = student(question.latents, question.timesteps, text, lengths, *told).float()
    return (answer - question.target).square().mean(dim=(1, 2, 3))


def levels_of(sigmas: Tensor) -> Tensor:
    """[B]: which part of 0..1."""
    return (sigmas * NUM_LEVELS).long().clamp(0, NUM_LEVELS - 1)


def level_sums(sigmas: Tensor, per_sample: Tensor) -> Tensor:
    """[2, NUM_LEVELS]: sums and counts of the loss per noise level; they add up over micro-batches and ranks."""
    level = levels_of(sigmas)
    sums = torch.zeros(2, NUM_LEVELS, device=sigmas.device, dtype=torch.float64)
    sums[0].index_add_(0, level, per_sample.double())
    sums[1].index_add_(0, level, torch.ones_like(per_sample, dtype=torch.float64))
    return sums


def level_weights(shares: tuple[float, ...] | None, contract: Contract, spans: Spans | None) -> Tensor | None:
    """[NUM_LEVELS]: what a sample weighs, so that the levels have `shares` of the loss whatever the harvest's density;
    the mean weight is 1. None: as harvested."""
    if shares is None:
        return None
    wanted = np.array(shares) / sum(shares)
    harvested = _density(contract, spans)
    if ((wanted > 0) & (harvested == 0)).any():
        raise Refused(
            wrong="level_shares asks for noise levels of which the set holds nothing",
            found=f"the harvest's own shares: {', '.join(f'{share:.2f}' for share in harvested)} (from low to high)",
            mend="give those a share of 0, or harvest with another shift",
        )
    return torch.from_numpy(np.divide(wanted, harvested, out=np.zeros(NUM_LEVELS), where=harvested > 0)).float()


def _density(contract: Contract, spans: Spans | None) -> np.ndarray:
    """Which share of the samples each level has; of what is drawn per record, the expectation. Jitter carries steps
    over the levels' edges: many grids are looked at."""
    grids = [contract_grid(contract, seed) for seed in range(NUM_GRIDS if contract.jitter else 1)]
    pinned = sorted(set(contract.keep_at))
    kept = np.arange(contract.steps) if contract.keep == contract.steps else np.array(pinned)
    if spans:
        chance = np.zeros(contract.steps)
        chance[kept[[begin for begin, _ in spans]]] = 1.0
    else:
        rest = contract.steps - len(pinned)
        chance = np.full(contract.steps, (contract.keep - len(pinned)) / rest if rest else 1.0)
        chance[pinned] = 1.0
    sigmas = np.concatenate([grid.sigmas[:-1] for grid in grids])
    level = np.minimum((sigmas * NUM_LEVELS).astype(int), NUM_LEVELS - 1)
    counts = np.bincount(level, weights=np.tile(chance, len(grids)), minlength=NUM_LEVELS)
    density: np.ndarray = counts / counts.sum()
    return density
