"""A receipt says that a shard is in place; the manifest of a set is the sum of its receipts.

    receipt = Receipt(...); receipt.to_json() -> at most 2 kB, closed by its own digest
    manifest = fold(set_dir / "receipts", set_dir / "shards")

A receipt is written after its shard is on disk under its final name: writing it *is* the commit. It holds nothing
that depends on when or where the work was done, so that a resumed set equals an uninterrupted one, byte for byte.
"""

import base64
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from common.errors import Corrupt
from common.record import Numerics

MAX_RECEIPT_BYTES = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """One committed shard."""

    item: str
    container: str
    """zarr"""
    shard: str
    """Name under shards/; it holds the start of `digest`, so another content is another name."""
    num_records: int
    num_points: int
    """K, per record."""
    height: int
    width: int
    num_tokens: int
    held_out: str
    """Base64 of one bit a record: those whose prompt is never trained on."""
    digest: str
    """sha256 over the records' digests, in order."""
    files: dict[str, list[int]]
    """Each file of the shard: bytes, crc32c."""
    numerics: Numerics

    def to_json(self) -> bytes:
        body = json.dumps(dataclasses.asdict(self), sort_keys=True)
        sealed = json.dumps({"receipt": json.loads(body), "sha256": _seal(body)}, sort_keys=True).encode() + b"\n"
        assert len(sealed) <= MAX_RECEIPT_BYTES, f"a receipt of {len(sealed)} bytes"
        return sealed

    @classmethod
    def from_json(cls, data: bytes, *, source: str) -> Self:
        try:
            sealed = json.loads(data)
            values: dict[str, Any] = sealed["receipt"]
            whole = sealed["sha256"] == _seal(json.dumps(values, sort_keys=True))
            receipt = cls(**{**values, "numerics": Numerics(**values["numerics"])}) if whole else None
        except (ValueError, KeyError, TypeError):
            receipt = None
        if receipt is None or Path(receipt.shard).name != receipt.shard or receipt.shard.startswith("."):
            raise Corrupt(
                wrong=f"receipt {source} is damaged",
                found="it does not match its own digest",
                mend="run `python -m harvest rebuild` to make it again from its shard",
            )
        return receipt

    def held_out_records(self) -> NDArray[np.bool_]:  # [num_records]
        bits = np.frombuffer(base64.b64decode(self.held_out), np.uint8)
        return np.unpackbits(bits, count=self.num_records).astype(bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All committed shards, sorted by item."""

    receipts: tuple[Receipt, ...] = ()
    absent: tuple[str, ...] = ()
    """Items whose receipt is here and whose shard is not, or not whole yet: a set that is being copied."""
    by_item: dict[str, Receipt] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_item", {receipt.item: receipt for receipt in self.receipts})

    @property
    def num_records(self) -> int:
        return sum(receipt.num_records for receipt in self.receipts)

    @property
    def num_points(self) -> int:
        return sum(receipt.num_records * receipt.num_points for receipt in self.receipts)

    @property
    def num_bytes(self) -> int:
        return sum(size for receipt in self.receipts for size, _ in receipt.files.values())


def fold(receipts_dir: Path, shards_dir: Path) -> Manifest:
    """Read every receipt whose shard stands whole beside it."""
    here, absent = [], []
    names = sorted(entry.name for entry in os.scandir(receipts_dir)) if receipts_dir.is_dir() else []
    for name in names:
        if not name.endswith(".json") or name.startswith("."):
            continue
        path = receipts_dir / name
        receipt = Receipt.from_json(path.read_bytes(), source=str(path))
        whole = _is_whole(receipt, shards_dir)
        here.append(receipt) if whole else absent.append(receipt.item)
    return Manifest(receipts=tuple(here), absent=tuple(absent))


def _is_whole(receipt: Receipt, shards_dir: Path) -> bool:
    shard = shards_dir / receipt.shard
    try:
        return all(os.stat(shard / name).st_size == size for name, (size, _) in receipt.files.items())
    except OSError:
        return False


def _seal(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
