"""The optimizers, their learning rates at each step, the moving average of the weights. All functions of the step."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.config import TrainConfig
from train.muon import Muon

EMA_WARMUP = 10.0
PEAK = "peak_lr"
"""Of a group of parameters."""
SLOTS: dict[type, tuple[str, ...]] = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum",)}
"""What is kept of each parameter, as large as it; but a step is one number."""


def make_optimizers(student: nn.Module, config: TrainConfig, *, num_ranks: int) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices inside and AdamW for the rest. Matrices decay, vectors (norms, biases,
    modulation tables) do not. Sharded, each rank holds the moments of its part of the parameters and sends the others
    what became of them: the same numbers, less memory."""

    def group(lr: float, weight_decay: float) -> dict[str, Any]:
        return {"params": [], "lr": lr, PEAK: lr, "weight_decay": weight_decay}

    groups = {"matrix": group(config.lr, config.weight_decay), "vector": group(config.lr, 0.0)}
    if config.muon is not None:
        groups["by_muon"] = group(config.muon.lr, config.weight_decay)
    for name, parameter in student.named_parameters():
        is_vector = parameter.ndim < 2 or "scale_shift_table" in name
        kind = "by_muon" if config.by_muon(name, parameter.shape) else "vector" if is_vector else "matrix"
        groups[kind]["params"] += [parameter] if parameter.requires_grad else []

    def made(optimizer: Any, names: Sequence[str], **options: Any) -> Iterator[torch.optim.Optimizer]:
        filled = [groups[name] for name in names if groups[name]["params"]]
        if filled and config.sharded_optimizer and num_ranks > 1:
            from torch.distributed.optim import ZeroRedundancyOptimizer

            yield ZeroRedundancyOptimizer(filled, optimizer, **options)
        elif filled:
            yield optimizer(filled, **options)

    optimizers = [*made(torch.optim.AdamW, ["matrix", "vector"], betas=config.betas, fused=True)]
    if config.muon is not None:
        optimizers += made(Muon, ["by_muon"], lr=config.muon.lr, momentum=config.muon.momentum)
    return optimizers


def learning_rate(step: int, total_steps: int, config: TrainConfig, peak: float) -> float:
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return peak
    share = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], student: nn.Module, step: int, decay: float) -> None:
    """ema += (1 - d) (weights - ema); d grows from 0 so that early steps are forgotten."""
    if not ema:
        return
    now = min(decay, (1 + step) / (EMA_WARMUP + step))
    weights = dict(student.named_parameters())
    near = [weights[name].to(average.device) for name, average in ema.items()]
    torch._foreach_lerp_(list(ema.values()), near, 1 - now)


def full_state(student: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """`<parameter>:<slot>`, by the parameters' names: independent of their order and of the number of ranks. All ranks
    walk it together; what another one holds is there until the next is asked for."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in student.named_parameters()}
    for optimizer in optimizers:
        slots = _of_all_ranks(optimizer) if is_sharded(optimizer) else _of_this_rank(optimizer)
        yield from ((f"{names[parameter]}:{slot}", value) for parameter, slot, value in slots)


def gather(student: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """What the other ranks do while the first one copies the full state: they send their part of it."""
    for _ in full_state(student, optimizers):
        pass


def _of_this_rank(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, str, Tensor]]:
    for parameter, slots in own_slots([optimizer]).items():
        yield from ((parameter, slot, value) for slot, value in slots.items())


def _of_all_ranks(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, str, Tensor]]:
    """One at a time, into one buffer: `consolidate_state_dict` has all of them twice on every GPU, and pickles them."""
    mine = own_slots([optimizer])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    mark = optimizer.rank + 1  # type: ignore[attr-defined]
    holders = torch.tensor([mark if mine.get(parameter) else 0 for parameter in parameters])  # 0: no step yet
    holders = holders.to(parameters[0].device)
    torch.distributed.all_reduce(holders)
    buffer = torch.empty_like(max(parameters, key=Tensor.numel)).flatten()
    for parameter, holder in zip(parameters, holders.tolist(), strict=True):
        for slot in SLOTS[type(own_part(optimizer))] if holder else ():
            there = buffer[0] if slot == "step" else buffer[: parameter.numel()].view_as(parameter)
            value = mine[parameter][slot] if parameter in mine else there
            torch.distributed.broadcast(value, src=holder - 1)
            yield parameter, slot, value


def own_slots(optimizers: Sequence[torch.optim.Optimizer]) -> dict[Tensor, dict[str, Tensor]]:
    """Of each parameter whose moments this rank holds: where they live, by slot; empty before the first step."""
    return {parameter: local.state[parameter] for local in map(own_part, optimizers) for group in local.param_groups
            for parameter in group["params"]}  # fmt: skip


def moments_to_come(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[Tensor]:
    """For each moment that this rank's first step will make, the parameter that it is as large as."""
    for optimizer in optimizers:
        num_moments = sum(slot != "step" for slot in SLOTS[type(own_part(optimizer))])
        for parameter, slots in own_slots([optimizer]).items():
            yield from [] if slots else [parameter] * num_moments


def own_part(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What this rank does of it."""
    part: torch.optim.Optimizer = optimizer.optim if is_sharded(optimizer) else optimizer  # type: ignore[attr-defined]
    return part


def is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    return hasattr(optimizer, "consolidate_state_dict")
