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
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from common.errors import Corrupt
from common.record import Numerics

MAX_RECEIPT_BYTES = 2048
_HEAD, _MIDDLE, _TAIL = b'{"receipt": ', b', "sha256": "', b'"}\n'
_CLOSING = len(_MIDDLE) + 64 + len(_TAIL)
MAX_RECORDS, MAX_POINTS = 2048, 4096
"""Per shard and per record: so that a receipt keeps within its bytes, and a hostile one wants no memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """One committed shard."""

    item: str
    container: str
    """zarr | tar, or an archive: zarr+zstd | zarr+pcodec"""
    stem: str
    """Of the names under shards/; it holds a digest of the shard's own bytes, so other bytes are another name."""
    contract: str
    """Digest of what the records mean."""
    num_records: int
    num_points: int
    """K, per record."""
    height: int
    width: int
    num_tokens: int
    held_out: str
    """Base64 of one bit a record: those whose prompt is never trained on."""
    guided_error: float
    """Relative L2 error of the encoding on the guided prediction: the worst record, at the set's own guidance."""
    guided_std: float
    """Standard deviation of the guided prediction over the shard, to three digits."""
    digest: str
    """sha256 over the records' digests, in order."""
    files: dict[str, list[int]]
    """What follows the stem in each file's name -> bytes, crc32c."""
    supersedes: str | None = None
    """Digest of the generation that a repair replaced."""
    numerics: Numerics

    def to_json(self) -> bytes:
        body = json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        sealed = _HEAD + body + _MIDDLE + hashlib.sha256(body).hexdigest().encode() + _TAIL
        assert len(sealed) <= MAX_RECEIPT_BYTES, f"a receipt of {len(sealed)} bytes"
        return sealed

    @classmethod
    def read(cls, path: Path | str) -> Self:
        fd = os.open(path, os.O_RDONLY)
        try:
            return cls.from_json(os.read(fd, MAX_RECEIPT_BYTES + 1), source=str(path))
        finally:
            os.close(fd)

    @classmethod
    def from_json(cls, data: bytes, *, source: str) -> Self:
        """`source`: the file's name, which is its item's."""
        body, seal = data[len(_HEAD) : -_CLOSING], data[-_CLOSING:]
        try:
            if seal != _MIDDLE + hashlib.sha256(body).hexdigest().encode() + _TAIL or not data.startswith(_HEAD):
                raise ValueError("it does not match its own digest")
            values: dict[str, Any] = json.loads(body)
            values["files"] = {sys.intern(name): facts for name, facts in values["files"].items()}
            values["numerics"] = Numerics(**values["numerics"])
            receipt = cls(**values)
            _require_sane(receipt)
            if os.path.basename(source) != f"{receipt.item}.json":
                raise ValueError(f"it is that of item {receipt.item}")
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
            raise Corrupt(
                wrong=f"receipt {source} is damaged",
                found=str(error).split("\n")[0],
                mend="run `python -m harvest rebuild SET` to make it again from its shard",
            ) from None
        return receipt

    def paths(self, shards_dir: Path) -> dict[str, Path]:
        return {name: shards_dir / (self.stem + name) for name in self.files}

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    def held_out_records(self) -> NDArray[np.bool_]:  # [num_records]
        bits = np.frombuffer(base64.b64decode(self.held_out), np.uint8)
        return np.unpackbits(bits, count=self.num_records).astype(bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All committed shards, sorted by item."""

    receipts: tuple[Receipt, ...] = ()
    absent: tuple[str, ...] = ()
    """Items whose receipt or shard is not whole: the set is being copied, or it is damaged (`verify` tells)."""
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
        return sum(receipt.num_bytes for receipt in self.receipts)


def fold(receipts_dir: Path, shards_dir: Path) -> Manifest:
    """Read every receipt whose shard stands whole beside it. Plain strings: a set may have 20,000 of them."""
    here: list[Receipt] = []
    absent: list[str] = []
    folder = f"{shards_dir}/"
    for path in receipt_paths(receipts_dir):
        receipt = whole_receipt(path, folder)
        here.append(receipt) if receipt else absent.append(os.path.basename(path)[: -len(".json")])
    return Manifest(receipts=tuple(here), absent=tuple(absent))


def whole_receipt(path: Path | str, shards_folder: str) -> Receipt | None:
    """The receipt, if it is valid and its shard stands whole below `shards_folder` (which ends in a slash)."""
    try:
        receipt = Receipt.read(path)
        stem = shards_folder + receipt.stem
        whole = all(os.stat(stem + name).st_size == facts[0] for name, facts in receipt.files.items())
    except (Corrupt, OSError):
        return None
    return receipt if whole else None


def receipt_paths(receipts_dir: Path) -> list[str]:
    """By item; temporary files of writers at work are not receipts."""
    names = sorted(entry.name for entry in os.scandir(receipts_dir)) if receipts_dir.is_dir() else []
    return [f"{receipts_dir}/{name}" for name in names if name.endswith(".json") and not name.startswith(".")]


_STEM = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}")
_PART = re.compile(r"\.(tar|idx|zarr(/(points|final|text))?/(zarr\.json|[0-9](\.[0-9])*))")


def _require_sane(receipt: Receipt) -> None:
    """A receipt may come from anywhere: it names files of its own shard only, and no count is absurd."""
    if not _STEM.fullmatch(receipt.stem) or not all(_PART.fullmatch(name) for name in receipt.files):
        raise ValueError("it names files outside its shard")
    counts = (receipt.num_records, receipt.num_points, receipt.num_tokens, receipt.height, receipt.width)
    if not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(f"counts {counts}")
    if receipt.num_records > MAX_RECORDS or receipt.num_points > MAX_POINTS:
        raise ValueError(f"{receipt.num_records} records of {receipt.num_points} points in one shard")
