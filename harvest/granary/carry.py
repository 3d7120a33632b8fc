"""A set from one place to another: resumed, verified on arrival, the source freed if asked.

    for receipt in carry(LocalPlace(a), LocalPlace(b)): ...

contract and assets, then per item its files, each read back and compared with the receipt, then the receipt: at every
moment the target is a valid set. A Place is five small methods; an object store is another class of them.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import google_crc32c

from common.errors import Corrupt, Refused
from common.files import pieces, write_atomic
from common.manifest import Receipt
from common.shards import ASSETS, CONTRACT_NAME, MOVED, RECEIPTS, SHARDS


class Place(Protocol):
    """Somewhere that holds files by name."""

    def names(self, prefix: str) -> list[str]:
        """Of all files below a folder, sorted."""

    def read(self, name: str) -> Iterator[bytes]: ...

    def write(self, name: str, content: Iterator[bytes]) -> None:
        """Whole or not at all."""

    def size(self, name: str) -> int | None: ...

    def remove(self, name: str) -> None: ...


class LocalPlace:
    """A folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self, prefix: str) -> list[str]:
        files = (path for path in (self.root / prefix).rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.root)) for path in files if not path.name.startswith("."))

    def read(self, name: str) -> Iterator[bytes]:
        return pieces(self.root / name)

    def write(self, name: str, content: Iterator[bytes]) -> None:
        write_atomic(self.root / name, content)

    def size(self, name: str) -> int | None:
        path = self.root / name
        return path.stat().st_size if path.is_file() else None

    def remove(self, name: str) -> None:
        path = self.root / name
        path.unlink(missing_ok=True)
        for folder in path.parents:  # a Zarr shard is a folder: it goes with its last file
            if folder.parent.name == SHARDS or folder.parent.parent.name == SHARDS:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def carry(source: Place, target: Place, *, free: bool = False) -> Iterator[Receipt]:
    """Copy what the target lacks; yields each receipt as its shard has arrived. With `free` the source keeps, of what
    arrived, only a note under moved/: it is still known to be done."""
    contract = b"".join(source.read(CONTRACT_NAME))
    if target.size(CONTRACT_NAME) is not None and b"".join(target.read(CONTRACT_NAME)) != contract:
        raise Refused(wrong="the target holds a set of another contract", found=CONTRACT_NAME, mend="carry elsewhere")
    target.write(CONTRACT_NAME, iter([contract]))
    for name in source.names(ASSETS):
        if target.size(name) != source.size(name):
            target.write(name, source.read(name))
    for name in source.names(RECEIPTS):
        data = b"".join(source.read(name))
        receipt = Receipt.from_json(data, source=name)
        keys = _keys(source, receipt) if free else ()
        if target.size(name) is None or b"".join(target.read(name)) != data:
            for part, (size, crc) in receipt.files.items():
                _carry_file(source, target, f"{SHARDS}/{receipt.stem}{part}", size, crc)
            target.write(name, iter([data]))
        if free:
            _free(source, target, receipt, name, keys)
        yield receipt


def _carry_file(source: Place, target: Place, name: str, size: int, crc: int) -> None:
    """One file, compared with its receipt after it has arrived; what arrived before and is whole stays."""
    if target.size(name) == size and _crc(target, name) == crc:
        return
    if source.size(name) is None:
        raise Corrupt(wrong=f"{name} is missing at the source", found="a receipt without its shard", mend="verify it")
    target.write(name, source.read(name))
    if target.size(name) != size or _crc(target, name) != crc:
        target.remove(name)
        raise Corrupt(wrong=f"{name} did not arrive as it was written", found="another size or crc32c",
                      mend="verify the source, then run the same command again")  # fmt: skip


def _free(source: Place, target: Place, receipt: Receipt, name: str, keys: tuple[str, ...]) -> None:
    """Only what stands whole at the target is removed here; the note comes first."""
    for part, (size, crc) in receipt.files.items():
        if _crc(target, f"{SHARDS}/{receipt.stem}{part}") != crc:
            target.remove(name)  # without its receipt the shard is copied again
            raise Corrupt(wrong=f"{receipt.stem}{part} is damaged at the target", found=f"not {size} whole bytes",
                          mend="run the same command again")  # fmt: skip
    note = {"item": receipt.item, "digest": receipt.digest, "keys": list(keys)}
    source.write(f"{MOVED}/{receipt.item}.json", iter([json.dumps(note).encode()]))
    source.remove(name)
    for part in receipt.files:
        source.remove(f"{SHARDS}/{receipt.stem}{part}")


def _crc(place: Place, name: str) -> int:
    crc = 0
    for piece in place.read(name):
        crc = google_crc32c.extend(crc, piece)
    return int(crc)


def _keys(place: Place, receipt: Receipt) -> tuple[str, ...]:
    """The item's keys, from the header at the source."""
    part = ".idx" if receipt.container == "tar" else ".zarr/zarr.json"
    values = json.loads(b"".join(place.read(f"{SHARDS}/{receipt.stem}{part}")))
    header = values["header"] if receipt.container == "tar" else values["attributes"]["shard"]
    return tuple(header["keys"])
