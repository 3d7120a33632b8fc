"""Tensors to their devices, while others are still being read.

lanes = Lanes()
there = lanes.send(tensor, "cuda:0")        through two pinned buffers on a side stream, one transfer at a time a GPU
pinned(tensor)                              a copy on pages of its own, which the driver may read by itself
there = sent(tensor, "cuda:0")              a small one in passing: nobody waits for what still computes

host tensor -> [pinned half A | pinned half B] -> GPU: one half is filled while the other is on its way
"""

import mmap
import threading

import torch
from torch import Tensor

from common.errors import Refused
from common.log import human_bytes

BUFFER_BYTES = 32 << 20
PIN_FROM_BYTES = 1 << 20
"""Smaller ones are many, and few bytes together."""


class Lanes:
    """One lane a GPU, made when it is first used."""

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane] = {}
        self._lock = threading.Lock()

    def send(self, tensor: Tensor, device: str) -> Tensor:
        if not device.startswith("cuda"):
            return tensor
        with self._lock:
            lane = self._lanes.setdefault(device, _Lane(device))
        return lane.send(tensor)


class _Lane:
    def __init__(self, device: str) -> None:
        self._device, self._lock = torch.device(device), threading.Lock()
        self._halves: list[Tensor] = []
        self._free: list[torch.cuda.Event] = []

    def send(self, tensor: Tensor) -> Tensor:
        with self._lock, torch.cuda.device(self._device):
            if not self._halves:
                self._stream = torch.cuda.Stream(self._device)
                self._halves = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
                self._free = [torch.cuda.Event() for _ in range(2)]
            # The side stream's own memory: it waits for nothing that still computes on the other. It is never given
            # back, so that no other stream can be handed it too early.
            with torch.cuda.stream(self._stream):
                there = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
            source = tensor.detach().contiguous().view(-1).view(torch.uint8)
            target = there.view(-1).view(torch.uint8)
            for number, start in enumerate(range(0, source.numel(), BUFFER_BYTES)):
                piece = source[start : start + BUFFER_BYTES]
                half, free = self._halves[number % 2][: len(piece)], self._free[number % 2]
                free.synchronize()
                half.copy_(piece)
                with torch.cuda.stream(self._stream):
                    target[start : start + len(piece)].copy_(half, non_blocking=True)
                    free.record(self._stream)
            self._stream.synchronize()  # the host tensor may go now, and any stream may read
            return there


def sent(tensor: Tensor, device: str) -> Tensor:
    """A copy out of pageable memory would wait until the device has done all that it was asked before."""
    if device.startswith("cuda") and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps the pinned piece until it is copied
    return tensor.to(device)


def pinned(tensor: Tensor) -> Tensor:
    """The same values in memory that the GPU fetches by itself. torch's own pinned memory comes in powers of two: up
    to twice what is wanted."""
    if tensor.nbytes < PIN_FROM_BYTES or not torch.cuda.is_available():
        return tensor
    there = on_own_pages(tensor)
    error = torch.cuda.cudart().cudaHostRegister(there.data_ptr(), there.nbytes, 0)
    if int(error) != 0:
        raise Refused(
            wrong="host memory cannot be pinned",
            found=f"CUDA error {int(error)} for {human_bytes(there.nbytes)}",
            mend="allow more locked memory, or take another teacher.placement",
        )
    return there


def on_own_pages(tensor: Tensor) -> Tensor:
    """A copy that shares no page with another: a page cannot be pinned twice."""
    there = torch.frombuffer(mmap.mmap(-1, tensor.nbytes), dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
    return there.copy_(tensor)


class Turns:
    """Networks of which one at a time is on the device; the others' weights wait in host memory and are never copied
    back: nobody changes them."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._waiting: dict[int, list[Tensor]] = {}
        self._here: torch.nn.Module | None = None

    def bring(self, network: torch.nn.Module) -> torch.nn.Module:
        if self._here is not network:
            self.clear()
            held = _tensors_of(network)
            self._waiting[id(network)] = [tensor.data for tensor in held]
            for tensor in held:
                tensor.data = tensor.data.to(self._device, non_blocking=True, copy=True)
            self._here = network
        return network

    def clear(self) -> None:
        """Nobody's turn: the device is free. What still computes there has read its weights before it is given away:
        the allocator hands memory on in the order of the stream."""
        if self._here is not None:
            for tensor, kept in zip(_tensors_of(self._here), self._waiting.pop(id(self._here)), strict=True):
                tensor.data = kept
            self._here = None


def _tensors_of(network: torch.nn.Module) -> list[Tensor]:
    """Parameters and buffers; a tied one once."""
    return [*network.parameters(), *network.buffers()]
