"""Which receipts an epoch is made of, frozen once and shared: run/epochs/NNNN.json.

    freeze = Epochs(shards, run_dir / "epochs", world).freeze
    receipts = freeze(3)              rank 0 writes the list if it is new; every rank reads the same file

A set may grow while it is trained on: what is committed when an epoch begins is that epoch, on all ranks, for ever.
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from common.errors import Partial, Refused, Stopped
from common.files import write_atomic
from common.manifest import Receipt
from common.shards import ShardSet

WAIT_S = 120.0


class Epochs:
    """The frozen epochs of a run."""

    def __init__(self, shards: ShardSet, folder: Path, *, rank: int, follow_s: float = 0.0,
                 stopping: Callable[[], bool] = lambda: False) -> None:  # fmt: skip
        """`follow_s`: an epoch that would bring nothing new waits so long for a shard to be committed, and no longer
        once the run is `stopping`: then the step in hand is taken, saved, and all leave."""
        self._shards, self._folder, self._rank, self._follow_s = shards, folder, rank, follow_s
        self._stopping = stopping

    def freeze(self, epoch: int) -> tuple[Receipt, ...]:
        path = self._path(epoch)
        if not path.exists():
            self._write(path, epoch) if self._rank == 0 else _wait_for(path, WAIT_S + self._follow_s)
        frozen = json.loads(path.read_bytes())["items"]  # item -> digest
        by_item = self._shards.manifest().by_item
        for item, digest in frozen.items():
            if item not in by_item:
                raise Partial(
                    wrong=f"epoch {epoch} needs item {item}",
                    found=f"{self._shards.path} no longer has its shard",
                    mend="copy it back, or start a new run",
                )
            if by_item[item].digest != digest:
                raise Refused(
                    wrong=f"item {item} is another than when epoch {epoch} was frozen",
                    found=f"digest {by_item[item].digest[:8]}, was {digest[:8]}",
                    mend="start a new run, or restore the shard",
                )
        return tuple(by_item[item] for item in frozen)

    def digest(self, epoch: int) -> str:
        """Stands in every checkpoint: a resumed run continues the same epoch or refuses."""
        try:
            return hashlib.sha256(self._path(epoch).read_bytes()).hexdigest()
        except FileNotFoundError:
            raise Partial(
                wrong=f"epoch {epoch} of this run is no longer known",
                found=f"no {self._path(epoch)}",
                mend="restore that folder, or start a new run",
            ) from None

    def _write(self, path: Path, epoch: int) -> None:
        receipts = self._followed(epoch)
        if not receipts and self._stopping():
            raise Stopped(wrong="asked to stop", found="no shard was committed yet", mend="run the same command again")
        if not receipts:
            raise Partial(wrong=f"{self._shards.path} holds no shard yet", found="0 receipts", mend="harvest first")
        frozen = {"epoch": epoch, "items": {receipt.item: receipt.digest for receipt in receipts}}
        write_atomic(path, json.dumps(frozen, indent=0).encode())

    def _followed(self, epoch: int) -> tuple[Receipt, ...]:
        """What is committed, once it is more than the epoch before had or the patience is at its end."""
        before = len(json.loads(self._path(epoch - 1).read_bytes())["items"]) if epoch else 0
        deadline = time.monotonic() + self._follow_s
        while len(receipts := self._shards.manifest().receipts) <= before and time.monotonic() < deadline:
            if self._stopping():
                return receipts
            time.sleep(min(1.0, self._follow_s / 20))
        if len(receipts) <= before:  # the harvest is over: later epochs do not wait for it again
            self._follow_s = 0.0
        return receipts

    def _path(self, epoch: int) -> Path:
        return self._folder / f"{epoch:04d}.json"


def _wait_for(path: Path, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise Partial(
                wrong="rank 0 did not freeze the epoch", found=f"no {path} in {patience_s:.0f} s", mend="run again"
            )
        time.sleep(0.02)
