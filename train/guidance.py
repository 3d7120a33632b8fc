"""Guidance as an input: w is drawn for each sample in training, and said to the student whenever it is asked.

    drawn = Drawn(low=1.0, high=5.0, seed=0, contract=contract)
    w = drawn.at(first, num)                    [num]: of the samples at these positions of the endless stream
    answer = said(student, drawn, w=None)       for a walk: `w` at every step, or the set's own of each step's expert

One student then answers for every w, as its teacher with classifier-free guidance does (Meng et al. 2210.03142, 3.1).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import Refused
from common.record import Contract
from common.schedule import expert_of

STREAM = 7
"""Of Philox, beside those of common/schedule."""
WORDS = 4
"""Numbers that one count of Philox's counter gives."""
Answer = Callable[..., Tensor]
"""(latents, timesteps, text, lengths[, w]) -> velocity: a student, or one with other weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """w between `low` and `high`, each as likely as any other."""

    low: float
    high: float
    seed: int
    contract: Contract

    def at(self, first: int, num: int) -> Tensor:
        """[num] float32: a function of seed and position alone."""
        key = [self.seed & 0xFFFF_FFFF_FFFF_FFFF, STREAM]
        uniform = np.random.Generator(np.random.Philox(key=key, counter=[first // WORDS, 0, 0, 0]))
        shares = uniform.random(first % WORDS + num)[first % WORDS :]
        return torch.from_numpy((self.low + (self.high - self.low) * shares).astype(np.float32))

    def own(self, timesteps: Tensor) -> Tensor:
        """[B]: the w that the set's teacher was walked with, at each timestep."""
        contract = self.contract
        experts = expert_of(timesteps.cpu().numpy(), contract.boundary, train_steps=contract.train_steps)
        return torch.tensor(contract.guidance, device=timesteps.device)[torch.from_numpy(experts.astype(np.int64))]

    def require(self, w: float) -> None:
        if not self.low <= w <= self.high:
            raise Refused(
                wrong=f"--guidance {w:g}",
                found=f"a student that was trained at {self.low:g} to {self.high:g}",
                mend="give one between these",
            )


def said(student: Answer, drawn: Drawn | None, w: float | None) -> Answer:
    """The student as a walk asks it. `drawn` None: a student that takes no w."""
    if drawn is None:
        refuse_guidance(w)
        return student
    if w is not None:
        drawn.require(w)

    def answer(latents: Tensor, timesteps: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
        told = drawn.own(timesteps) if w is None else torch.full_like(timesteps, w)
        return student(latents, timesteps, text, lengths, told)

    return answer


def refuse_guidance(w: float | None) -> None:
    if w is not None:
        raise Refused(
            wrong=f"--guidance {w:g}",
            found="a student that was trained at one guidance: it is inside its answers",
            mend="leave --guidance away, or train with guidance: {low: ..., high: ...}",
        )
