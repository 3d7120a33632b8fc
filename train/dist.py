"""One process among several, or alone.

    with joined(config.device) as world: ...          torchrun's environment, or a world of one

gloo on CPUs, NCCL on GPUs. Nothing else in train/ asks who else is there.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed
from torch import Tensor, nn

from common.errors import BadUsage
from common.log import gpu_label


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def device_name(self) -> str:
        """For people: an index alone means nothing under CUDA_VISIBLE_DEVICES."""
        if self.device.type != "cuda":
            return f"{self.device} rank{self.rank}"
        uuid = str(torch.cuda.get_device_properties(self.device).uuid)
        return gpu_label(index=self.device.index, uuid=uuid, rank=self.rank)

    def wrap(self, student: nn.Module) -> nn.Module:
        """Gradients averaged over all processes."""
        if self.size == 1:
            return student
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(student, device_ids=ids)

    def summed(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any process says so; all of them learn it."""
        return bool(self.summed(torch.tensor([float(flag)], device=self.device)).item() > 0)


@contextlib.contextmanager
def joined(device: str, *, timeout_s: float) -> Iterator[World]:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    use_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if use_cuda and local >= torch.cuda.device_count():
        raise BadUsage(
            wrong=f"process {local} of this node has no GPU",
            found=f"{torch.cuda.device_count()} GPUs",
            mend="start as many processes as GPUs (torchrun --nproc-per-node)",
        )
    place = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(place)
    if size > 1:
        backend = "nccl" if use_cuda else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield World(rank=rank, size=size, device=place)
    finally:
        if size > 1:
            torch.distributed.destroy_process_group()
