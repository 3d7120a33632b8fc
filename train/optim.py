"""The optimizer, its learning rate at each step, and the moving average of the weights. All functions of the step."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from train.config import TrainConfig

EMA_WARMUP = 10.0


def make_optimizer(student: nn.Module, config: TrainConfig, *, num_ranks: int) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors (norms, biases, modulation tables) do not. Sharded, each rank holds the moments
    of its part of the parameters and sends the others what became of them: the same bits, less memory."""
    named = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in named if parameter.ndim >= 2 and "scale_shift_table" not in name]
    chosen = {id(parameter) for parameter in matrices}
    vectors = [parameter for _, parameter in named if id(parameter) not in chosen]
    decays = ((matrices, config.weight_decay), (vectors, 0.0))
    groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in decays if parameters]
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "fused": True}
    if not config.sharded_optimizer or num_ranks == 1:
        return torch.optim.AdamW(groups, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
    return optimizer


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
    near = [weights[name].to(average.device) for name, average in ema.items()]
    torch._foreach_lerp_(list(ema.values()), near, 1 - now)


def gather_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """All ranks together, before the first one asks for the full state."""
    if is_sharded(optimizer):
        optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]


def full_optimizer_state(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<parameter>:<slot>`, by the parameters' names: independent of their order and of the number of ranks."""
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    in_order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict()["state"]
    return {
        f"{in_order[number]}:{slot}": torch.as_tensor(value).detach()
        for number, slots in state.items()
        for slot, value in slots.items()
    }


def own_state(optimizer: torch.optim.Optimizer) -> tuple[dict[Tensor, dict[str, Tensor]], set[Tensor]]:
    """Where this rank's moments live, and the parameters that it has them of."""
    local = optimizer.optim if is_sharded(optimizer) else optimizer  # type: ignore[attr-defined]
    return local.state, {parameter for group in local.param_groups for parameter in group["params"]}


def is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    return hasattr(optimizer, "consolidate_state_dict")
