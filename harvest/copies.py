"""From the device to the host beside the next forward.

    copies = Copies()
    host = copies.take(fed, guided)           begins at once, on a stream of its own, into pinned memory
    copies.settle()                           before anybody reads them

On a CPU the copy is a plain one: a view of one record would keep its whole micro-batch in memory.
"""

import torch
from torch import Tensor


class Copies:
    """Those of one item: bounded by what an item keeps."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.Event | None = None

    def take(self, *tensors: Tensor) -> list[Tensor]:
        """Not to be read before `settle`; the originals may be dropped at once."""
        if not tensors[0].is_cuda:
            return [tensor.clone() for tensor in tensors]
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensors[0].device)
        self._stream.wait_stream(torch.cuda.current_stream(tensors[0].device))
        with torch.cuda.stream(self._stream):
            hosts = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
            self._last = self._stream.record_event()
        for tensor in tensors:
            tensor.record_stream(self._stream)  # its memory is not given away before it is copied
        return hosts

    def settle(self) -> None:
        if self._last is not None:
            self._last.synchronize()
