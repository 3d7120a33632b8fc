"""How far a command on whole sets is: what says nothing for an hour looks hung.

told = Told("verify", manifest.receipts)
told(receipt)                              after each shard: a line now and then
"""

import time
from collections.abc import Sequence

from common.log import Log, human_bytes, human_seconds
from common.manifest import Receipt

EVERY_S = 15.0


class Told:
    """Of shards that take as long as they have bytes."""

    def __init__(self, what: str, receipts: Sequence[Receipt]) -> None:
        self._what, self._num_shards, self._num_bytes = what, len(receipts), sum(each.num_bytes for each in receipts)
        self._done_shards = self._done_bytes = 0
        self._began = self._said_at = time.monotonic()

    def __call__(self, receipt: Receipt) -> None:
        self._done_shards, self._done_bytes = self._done_shards + 1, self._done_bytes + receipt.num_bytes
        now = time.monotonic()
        if now - self._said_at < EVERY_S:
            return
        self._said_at, rate = now, self._done_bytes / (now - self._began)
        left = human_seconds(max(self._num_bytes - self._done_bytes, 0) / rate)
        Log("harvest").say(f"{self._what}: {self._done_shards} of {self._num_shards} shards",
                           done=human_bytes(self._done_bytes), rate=f"{human_bytes(rate)}/s", left=left)  # fmt: skip
