"""The optimizer, its learning rate at each step, and the moving average of the weights. All functions of the step."""

import math

import torch
from torch import Tensor, nn

from train.config import TrainConfig

EMA_WARMUP = 10.0


def make_optimizer(student: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors (norms, biases, modulation tables) do not."""
    named = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in named if parameter.ndim >= 2 and "scale_shift_table" not in name]
    chosen = {id(parameter) for parameter in matrices}
    vectors = [parameter for _, parameter in named if id(parameter) not in chosen]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    share = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], student: nn.Module, step: int, decay: float) -> None:
    """ema += (1 - d) (weights - ema); d grows from 0 so that early steps are forgotten."""
    now = min(decay, (1 + step) / (EMA_WARMUP + step))
    weights = dict(student.named_parameters())
    torch._foreach_lerp_(list(ema.values()), [weights[name] for name in ema], 1 - now)
