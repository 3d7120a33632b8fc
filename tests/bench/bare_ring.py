"""What any ring can reach here: two processes that preadv into two slots of shared memory, and hand them over.

No set, no order, no texts, no checksums, nobody who dies: what a ring of ours misses of it is our code, what it misses
of one raw reader is the machine. No torch: the processes import this.
"""

import mmap
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_SLOTS, NUM_READERS = 2, 2
WAIT_S = 60.0
Place = tuple[str, int]
"""File, offset."""


class BareRing:
    """Batches of pieces of `length` bytes that lie at `places`."""

    def __init__(self, places: list[Place], length: int, batch: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._fd = os.memfd_create("bare ring")
        os.ftruncate(self._fd, NUM_SLOTS * batch * length)
        self._slots = _slots(self._fd, length, batch)
        self._orders = [context.SimpleQueue() for _ in range(NUM_READERS)]
        self._free = [context.Semaphore(NUM_SLOTS) for _ in range(NUM_READERS)]
        self._filled = [context.Semaphore(0) for _ in range(NUM_READERS)]
        memory = f"/proc/{os.getpid()}/fd/{self._fd}"
        self._readers = [
            context.Process(
                target=_read,
                args=(number, memory, places, length, batch, *(kind[number] for kind in self._shared)),
                daemon=True,
            )
            for number in range(NUM_READERS)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def _shared(self) -> tuple[list[Any], ...]:
        return self._orders, self._free, self._filled

    def epoch(self, numbers: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Pieces of these numbers: [batch, length], good until the next batch."""
        batch = self._slots.shape[1]
        for order in self._orders:
            order.put(numbers)
        for step, asked in enumerate(numbers.reshape(-1, batch)):
            if not all(filled.acquire(timeout=WAIT_S) for filled in self._filled):
                raise TimeoutError(f"a bare reader has not filled batch {step} for {WAIT_S:.0f} s")
            yield asked, self._slots[step % NUM_SLOTS]
            for free in self._free:
                free.release()

    def close(self) -> None:
        for reader in self._readers:
            reader.kill()
            reader.join()
        os.close(self._fd)


def _slots(fd: int, length: int, batch: int) -> NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(fd, NUM_SLOTS * batch * length), np.uint8).reshape(NUM_SLOTS, batch, length)


def _read(
    number: int, memory: str, places: list[Place], length: int, batch: int, orders: Any, free: Any, filled: Any
) -> None:
    slots = _slots(os.open(memory, os.O_RDWR), length, batch)
    mine = range(number, batch, NUM_READERS)
    buffers = [[[slot[row].data] for row in mine] for slot in slots]
    fds = {path: os.open(path, os.O_RDONLY) for path, _ in places}
    where = [(fds[path], offset) for path, offset in places]
    while True:
        numbers = orders.get().reshape(-1, batch)
        for step, asked in enumerate(numbers[:, number::NUM_READERS].tolist()):
            free.acquire()
            for wanted, buffer in zip(asked, buffers[step % NUM_SLOTS], strict=True):
                fd, offset = where[wanted]
                os.preadv(fd, buffer, offset)
            filled.release()
