"""A process that fills slots of the ring: `python -m train.feed.ring_worker SET MEMORY_FD CHANNEL_FD NUMBER OPTIONS`.

Started by ring.py, never by hand. It imports no torch, holds nothing that lasts, and ends when its parent does: the
channel is then at its end. Messages are lines of JSON; what is big lies in the shared memory.

    {"offset", "size", "num_samples", "num_workers"} -> the slot there and its request -> this worker's share of it,
    filled -> a Piece, or the fault
"""

import contextlib
import json
import mmap
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import Fault
from common.record import Array
from common.shards import ShardSet
from train.feed.filling import Filler, Options
from train.feed.pieces import Share
from train.feed.slots import Slot, SlotPlan

PROGRESS_BYTES = 4096
"""At the start of the shared memory: for each worker, which row it is at."""


def progress_of(memory_fd: int, worker: int) -> Array:  # [1] int64
    page = mmap.mmap(memory_fd, PROGRESS_BYTES)
    return np.frombuffer(page, np.int64, 1, worker * 8)


class Worker:
    """Requests in, filled slots out."""

    def __init__(self, set_path: Path, memory_fd: int, number: int, options: Options) -> None:
        self._shards = ShardSet.open(set_path, library=options.library)
        self._memory_fd, self._number, self._options = memory_fd, number, options
        self._filler = Filler(self._shards, options)
        self._progress = progress_of(memory_fd, number)
        self._slots: dict[bytes, tuple[Slot, Share]] = {}
        """By the line that asks for it."""

    def answer(self, task: bytes) -> bytes:
        try:
            slot, share = self._slots.get(task) or self._mapped(task)
            return json.dumps(self._filler.fill(slot, self._progress, share)).encode()
        except Fault as fault:
            return fault_to_json(fault)

    def _mapped(self, task: bytes) -> tuple[Slot, Share]:
        said: dict[str, Any] = json.loads(task)
        plan = SlotPlan(contract=self._shards.contract, size=tuple(said["size"]), num_samples=said["num_samples"],
                        text_rows=self._options.text_rows, spans=self._options.spans)  # fmt: skip
        memory = mmap.mmap(self._memory_fd, plan.num_bytes, offset=said["offset"])
        share = Share(self._number, said["num_workers"])
        self._slots[task] = Slot(plan, memory, offset=said["offset"]), share
        return self._slots[task]


def fault_to_json(fault: Fault) -> bytes:
    three_parts = {"wrong": fault.wrong, "found": fault.found, "mend": fault.mend}
    return json.dumps({"fault": type(fault).__name__, **three_parts}).encode()


def main(set_path: str, memory_fd: str, channel_fd: str, number: str, options: str) -> None:
    # Who asks the run to stop means the training loop, which ends us when its step is done.
    for number_of_signal in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number_of_signal, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # bulk work: woken, it does not push the training loop aside
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    channel = socket.socket(fileno=int(channel_fd))
    worker = Worker(Path(set_path), int(memory_fd), int(number), Options(**json.loads(options)))
    with contextlib.suppress(ConnectionError):
        for task in channel.makefile("rb"):
            channel.sendall(worker.answer(task) + b"\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
