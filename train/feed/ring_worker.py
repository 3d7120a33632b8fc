"""A process that fills slots of the ring: `python -m train.feed.ring_worker SET MEMORY_FD CHANNEL_FD NUMBER OPTIONS`.

Started by ring.py, never by hand. It imports no torch, holds nothing that lasts, and ends when its parent does: the
channel is then at its end. Messages are JSON; what is big lies in the shared memory.

    {"offset", "size", "num_samples"} -> the slot there and its request -> filled -> a Filled, or the fault
"""

import functools
import json
import mmap
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import Fault, Refused
from common.manifest import Receipt
from common.record import Array
from common.shards import ShardSet
from train.feed.filling import Filler
from train.feed.order import Sample
from train.feed.reading import Options
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
        self._memory_fd, self._options = memory_fd, options
        self._filler = Filler(self._shards, text_rows=options.text_rows, on_corrupt=options.on_corrupt,
                              by_segments=bool(options.spans))  # fmt: skip
        self._progress = progress_of(memory_fd, number)
        self._slots: dict[int, Slot] = {}
        self._receipt = functools.lru_cache(maxsize=1024)(self._read_receipt)

    def answer(self, message: bytes) -> bytes:
        task = json.loads(message)
        try:
            slot = self._slot(task)
            samples = [Sample(self._receipt(stem), record, point) for stem, record, point in slot.request.tolist()]
            return json.dumps(self._filler.fill(slot, samples, self._progress)).encode()
        except Fault as fault:
            return fault_to_json(fault)

    def _slot(self, task: dict[str, Any]) -> Slot:
        offset = task["offset"]
        if offset not in self._slots:
            plan = SlotPlan(contract=self._shards.contract, size=tuple(task["size"]), num_samples=task["num_samples"],
                            text_rows=self._options.text_rows, spans=self._options.spans)  # fmt: skip
            memory = mmap.mmap(self._memory_fd, plan.num_bytes, offset=offset)
            self._slots[offset] = Slot(plan, memory, offset=offset)
        return self._slots[offset]

    def _read_receipt(self, stem: bytes) -> Receipt:
        """The one that the epoch was frozen with: its stem says its content."""
        item = stem.decode().partition("-")[0]
        receipt = Receipt.read(self._shards.receipt_path(item))
        if receipt.stem != stem.decode():
            raise Refused(
                wrong=f"item {item} is another than when its epoch began",
                found=f"{receipt.stem}, was {stem.decode()}",
                mend="start a new run, or restore the shard",
            )
        return receipt


def fault_to_json(fault: Fault) -> bytes:
    three_parts = {"wrong": fault.wrong, "found": fault.found, "mend": fault.mend}
    return json.dumps({"fault": type(fault).__name__, **three_parts}).encode()


def main(set_path: str, memory_fd: str, channel_fd: str, number: str, options: str) -> None:
    # Who asks the run to stop means the training loop, which ends us when its step is done.
    for number_of_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number_of_signal, signal.SIG_IGN)
    channel = Connection(int(channel_fd))
    try:
        worker = Worker(Path(set_path), int(memory_fd), int(number), Options(**json.loads(options)))
        while True:
            channel.send_bytes(worker.answer(channel.recv_bytes()))
    except (EOFError, ConnectionError):
        return


if __name__ == "__main__":
    main(*sys.argv[1:])
