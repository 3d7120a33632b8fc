"""Muon: matrices that step as far in all directions (Jordan et al. 2024), on AdamW's scale (Liu et al. 2502.16982).

    optimizer = Muon(matrices, lr=8e-3, momentum=0.9, weight_decay=0.01)

What torch.optim.Muon does (the tests hold it against that), with matrices of one shape side by side: a tenth of the
calls, a third of the time where they are small (docs/log.md). A step needs up to 16 bytes a number of what goes side
by side, after the backward pass has freed what it kept.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
RMS = 0.2
"""Of a step's entries, in units of the learning rate: as AdamW's usually are."""
SIDE_BY_SIDE = 1 << 24
"""Numbers, or one matrix."""


class Muon(torch.optim.Optimizer):
    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for matrices in stacks(group["params"]):
                self._move(matrices, lr=group["lr"], momentum=group["momentum"], weight_decay=group["weight_decay"])

    def _move(self, matrices: list[Tensor], *, lr: float, momentum: float, weight_decay: float) -> None:
        grads = [matrix.grad for matrix in matrices if matrix.grad is not None]
        averages = [self._average_of(matrix) for matrix in matrices]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        steps = orthogonal(torch.stack(torch._foreach_lerp(grads, averages, momentum)))  # ahead, as Nesterov's
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        torch._foreach_add_(matrices, list(steps.unbind()), alpha=-lr * RMS * max(steps.shape[1:]) ** 0.5)

    def _average_of(self, matrix: Tensor) -> Tensor:
        slots = self.state[matrix]
        if "momentum" not in slots:
            slots["momentum"] = torch.zeros_like(matrix)
        average: Tensor = slots["momentum"]
        return average


def stacks(matrices: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Those with a gradient, of one shape each and no more than go side by side."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        if matrix.grad is not None:
            by_shape.setdefault(matrix.shape, []).append(matrix)
    for shape, alike in by_shape.items():
        num = max(1, SIDE_BY_SIDE // shape.numel())
        yield from (alike[start : start + num] for start in range(0, len(alike), num))


def orthogonal(matrices: Tensor) -> Tensor:  # [M, rows, columns] -> the same
    """Singular values of about 1 with the vectors that there are, by Newton and Schulz's iteration in bfloat16."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide.bfloat16()
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]  # none is larger than 1
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide is matrices else x.mT.contiguous()).to(matrices.dtype)
