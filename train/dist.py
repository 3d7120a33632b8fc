"""One process among several, or alone.

    with joined(config.device) as world: ...          torchrun's environment, or a world of one

gloo on CPUs, NCCL on GPUs. Nothing else in train/ asks who else is there.
"""

import atexit
import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed
from torch import Tensor, nn

from common.errors import BadUsage, Fault, Stopped
from common.log import gpu_label

KILOBYTES = 1 if sys.platform == "darwin" else 1024
"""In which the system tells a process's largest size."""


HOST = torch.device("cpu")
COLLECTIVE_S = 3600.0
"""At least: rank 0 measures and draws alone, while the others wait for it. The watch names a stall long before."""


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
        """On GPUs gradients are averaged while the backward pass goes on; on CPUs see `flat_gradients`."""
        if self.size == 1 or self.device.type != "cuda":
            return student
        ids = [self.device.index]
        return nn.parallel.DistributedDataParallel(student, device_ids=ids, gradient_as_bucket_view=True,
                                                   broadcast_buffers=False)  # fmt: skip

    def flat_gradients(self, student: nn.Module) -> "FlatGradients | None":
        """On CPUs, where there is nothing to hide an average behind."""
        return FlatGradients(self, student) if self.size > 1 and self.device.type != "cuda" else None

    def memory(self) -> dict[str, int]:
        """Bytes at the highest, for the metrics: of this process, or of its GPU since it began."""
        if self.device.type == "cuda":
            return {"peak_bytes": torch.cuda.max_memory_allocated(self.device),
                    "reserved_bytes": torch.cuda.max_memory_reserved(self.device)}  # fmt: skip
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTES}

    def summed(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def smallest(self, number: int) -> int:
        """Of all processes' numbers."""
        told = torch.tensor([number], device=self.device)
        if self.size > 1:
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MIN)
        return int(told.item())

    def any(self, flag: bool) -> bool:
        """Whether any process says so; all of them learn it."""
        return bool(self.summed(torch.tensor([float(flag)], device=self.device)).item() > 0)


class FlatGradients:
    """All gradients as views of one buffer: averaged in one message and, whatever the number of ranks and the steps
    taken so far, in one order. (DistributedDataParallel cuts its buckets anew after the first step.)"""

    def __init__(self, world: World, student: nn.Module) -> None:
        self._world = world
        self._parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in self._parameters]
        self._buffer = torch.zeros(sum(sizes), device=world.device)
        self._views = [
            part.view_as(parameter) for part, parameter in zip(self._buffer.split(sizes), self._parameters, strict=True)
        ]

    def zero(self) -> None:
        self._buffer.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def average(self) -> None:
        self._world.summed(self._buffer).div_(self._world.size)


def device_of(name: str | None) -> torch.device:
    """As a command was told it; None: the GPU where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise BadUsage(wrong="--device", found=name, mend="cpu, cuda or cuda:N")
    num = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= num:
        raise BadUsage(wrong=f"--device {name}", found=f"{num} GPUs", mend="name another, or cpu")
    return torch.device(name)


@contextlib.contextmanager
def joined(device: str, *, timeout_s: float) -> Iterator[World]:
    place = _place(device, int(os.environ.get("LOCAL_RANK", "0")))
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size > 1:
        backend = "nccl" if place.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=max(timeout_s, COLLECTIVE_S)))
    try:
        yield World(rank=rank, size=size, device=place)
    except Stopped:  # all of them leave
        _part(size)
        raise
    except BaseException as fault:
        if size > 1:
            # The others wait in a collective, and NCCL's farewell would wait for them: a fault that nobody hears of.
            atexit.register(_end_at_once, fault.exit_code if isinstance(fault, Fault) else 1)
        raise
    _part(size)


def _part(size: int) -> None:
    if size > 1:
        torch.distributed.destroy_process_group()


def _end_at_once(code: int) -> None:
    """At the process's end, when the fault has been told: the launcher sees it and ends the others."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _place(device: str, local: int) -> torch.device:
    if device != "auto":
        named = device_of(device)
        if named.type == "cpu" or named.index is not None:
            return named
    num = torch.cuda.device_count()
    if device == "auto" and not torch.cuda.is_available():
        return HOST
    if num == 1 and "SLURM_LOCALID" in os.environ:  # srun --gpus-per-task=1: each task sees its own, and no other
        return torch.device("cuda", 0)
    if local >= num:
        raise BadUsage(
            wrong=f"process {local} of this node has no GPU",
            found=f"{num} GPUs",
            mend="start as many processes as GPUs (torchrun --nproc-per-node)",
        )
    return torch.device("cuda", local)
