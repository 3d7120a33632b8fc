"""Every byte of a set against its checksums, at disk speed.

    for damage in verify(shards): ...          missing | torn | altered, by item, file, record and field
    for damage in verify_assets(shards): ...   of what stands beside the shards
    for damage in verify_notes(shards): ...
    require_whole(shards, receipt)             raises the first one

A file is read once, against the crc32c in its receipt; only an altered one is looked into, piece by piece.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import Corrupt
from common.extents import Extents, measured
from common.manifest import Receipt, receipt_paths
from common.seals import SEALS, damage_of, sealed
from common.shard_reader import ARCHIVES, OffsetReader, damaged
from common.shards import ASSETS, CONTRACT_NAME, MOVED, QUARANTINE, RECEIPTS, ShardSet
from harvest.plan import keys_of_moved
from harvest.quarantine import read_note
from harvest.samples import SAMPLES

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


def verify(shards: ShardSet, examined: Callable[[Receipt], None] = lambda receipt: None) -> Iterator[Damage]:
    """All damages of a set, receipts that do not match their own digest included, and a contract that is not theirs."""
    receipts = []
    for path in receipt_paths(shards.path / RECEIPTS):
        try:
            receipts.append(Receipt.read(path))
        except Corrupt as fault:
            name = Path(path).name
            yield Damage(item=name[:16], kind="altered", file=name, pieces=LOST_RECEIPT, found=fault.found)
    yield from _strangers(shards, receipts)
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda receipt: list(examine(shards, receipt)), receipts)
        for receipt, damages in zip(receipts, found, strict=True):
            yield from damages
            examined(receipt)


def _strangers(shards: ShardSet, receipts: Sequence[Receipt]) -> Iterator[Damage]:
    """Either the contract was altered, or they are another set's."""
    mine = shards.contract.digest()
    for digest in sorted({receipt.contract for receipt in receipts} - {mine}):
        items = [receipt.item for receipt in receipts if receipt.contract == digest]
        yield Damage(item=items[0], kind="altered", file=CONTRACT_NAME, pieces=(f"all records of {len(items)} items",),
                     found=f"their contract is {digest[:16]}, this one {mine[:16]}")  # fmt: skip


def verify_notes(shards: ShardSet) -> Iterator[Damage]:
    """Their names say which keys are in them."""
    reads: dict[str, Callable[[Path], Any]] = {QUARANTINE: read_note, MOVED: keys_of_moved}
    for folder, read in reads.items():
        for path in sorted((shards.path / folder).glob("[!.]*.json")):
            try:
                read(path)
            except Corrupt as fault:
                yield Damage(item=path.stem, kind="altered", file=f"{folder}/{path.name}", pieces=(), found=fault.found)


def verify_assets(shards: ShardSet) -> Iterator[Damage]:
    """Against their seals; samples and first students have their own."""
    assets = shards.path / ASSETS
    for seals in sorted(path for path in assets.rglob(SEALS) if path.is_dir()):
        for name in sealed(seals.parent):
            if damage := damage_of(seals.parent, name):
                file = str((seals.parent / name).relative_to(assets))
                yield Damage(item=ASSETS, kind=damage[0], file=file, pieces=(), found=damage[1])
    if (assets / SAMPLES / CONTRACT_NAME).exists():
        yield from verify(ShardSet.open(assets / SAMPLES))


def examine(shards: ShardSet, receipt: Receipt) -> Iterator[Damage]:
    """What is wrong with one shard."""
    for name, path in receipt.paths(shards.shards_dir).items():
        size, crc = receipt.files[name]
        try:
            found_size, found_crc = measured(path)
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
