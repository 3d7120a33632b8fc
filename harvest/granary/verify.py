"""Every byte of a set against its checksums, at disk speed.

    for damage in verify(shards): ...          missing | torn | altered, by item, file, record and field
    require_whole(shards, receipt)             raises the first one

A file is read once, against the crc32c in its receipt; only an altered one is looked into, piece by piece.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from common.errors import Corrupt
from common.extents import Extents
from common.manifest import Receipt, receipt_paths
from common.shard_reader import ARCHIVES, OffsetReader, damaged
from common.shards import RECEIPTS, ShardSet

READ_BYTES = 1 << 22
THREADS = 4
LOST_RECEIPT = ("the receipt",)
"""What was hit when a receipt does not match its own digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    item: str
    kind: str
    """missing | torn | altered"""
    file: str
    pieces: tuple[str, ...]
    """Records and fields that cannot be read; empty: none, what was hit lies between them."""
    found: str

    def __str__(self) -> str:
        pieces = "; ".join(self.pieces[:4]) + (f" and {len(self.pieces) - 4} more" if len(self.pieces) > 4 else "")
        return f"item {self.item}: {self.file} {self.kind} ({self.found}); hit: {pieces or 'no record'}"


def verify(shards: ShardSet) -> Iterator[Damage]:
    """All damages of a set, receipts that do not match their own digest included."""
    receipts = []
    for path in receipt_paths(shards.path / RECEIPTS):
        try:
            receipts.append(Receipt.read(path))
        except Corrupt as fault:
            name = Path(path).name
            yield Damage(item=name[:16], kind="altered", file=name, pieces=LOST_RECEIPT, found=fault.found)
    with ThreadPoolExecutor(THREADS) as pool:
        for damages in pool.map(lambda receipt: list(examine(shards, receipt)), receipts):
            yield from damages


def examine(shards: ShardSet, receipt: Receipt) -> Iterator[Damage]:
    """What is wrong with one shard."""
    for name, path in receipt.paths(shards.shards_dir).items():
        size, crc = receipt.files[name]
        try:
            found_size, found_crc = _measure(path)
        except OSError as error:
            kind, found = "missing", error.strerror or "unreadable"
        else:
            if (found_size, found_crc) == (size, crc):
                continue
            kind = "altered" if found_size == size else "torn"
            found = f"crc32c {found_crc:08x} for {crc:08x}" if kind == "altered" else f"{found_size} bytes of {size}"
        pieces = tuple(_hit(shards, receipt, name, kind))
        yield Damage(item=receipt.item, kind=kind, file=path.name if path.parent == shards.shards_dir else name,
                     pieces=pieces, found=found)  # fmt: skip


def require_whole(shards: ShardSet, receipt: Receipt) -> None:
    for damage in examine(shards, receipt):
        raise damaged(receipt, f"{damage.file} ({'; '.join(damage.pieces[:2])})", f"{damage.kind}, {damage.found}")


def _measure(path: Path) -> tuple[int, int]:
    size = crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(READ_BYTES):
            size += len(chunk)
            crc = google_crc32c.extend(crc, chunk)
    return size, crc


def _hit(shards: ShardSet, receipt: Receipt, name: str, kind: str) -> Iterator[str]:
    """Which records and fields are lost with what is wrong in one file."""
    field = _field_of(name)
    if field == "header" or receipt.container in ARCHIVES:
        yield f"{field} of all {receipt.num_records} records"
        return
    try:
        reader = OffsetReader(shards.shards_dir, receipt, shards.contract)
    except Corrupt as fault:
        yield f"{field} of all {receipt.num_records} records ({fault.found})"
        return
    tables = reader.tables
    if kind == "missing":
        yield f"{field} of all {receipt.num_records} records"
        return
    for extents in (tables.points, tables.final, tables.text):
        yield from (fault.wrong.split(" in ")[0] for fault in _bad_pieces(extents))


def _bad_pieces(extents: Extents) -> Iterator[Corrupt]:
    out = bytearray(extents.length)
    for index in range(len(extents)):
        try:
            extents.read(index, memoryview(out))
        except Corrupt as fault:
            yield fault


def _field_of(name: str) -> str:
    """What a file of a shard holds."""
    if name.endswith((".idx", "zarr.json")):
        return "header"
    return next((field for field in ("points", "final", "text") if f"/{field}/" in name), "everything")
