"""A set from one place to another: resumed, verified on arrival, the source freed if asked.

    for receipt in carry(LocalPlace(a), LocalPlace(b)): ...

contract, assets and the notes on what was set aside, then per item its files, each read back and compared with the
receipt, then the receipt: at every moment the target is a valid set. What stands whole at the target is never replaced,
but by what names it as superseded.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import google_crc32c

from common.errors import Corrupt, Fault, Refused
from common.files import FULL
from common.manifest import Receipt
from common.seals import SEALS, read_seal
from common.shards import ASSETS, CONTRACT_NAME, MOVED, QUARANTINE, RECEIPTS, SHARDS
from harvest.assets import VAE_CONFIG
from harvest.granary.place import Place
from harvest.quarantine import Note, joined


def carry(source: Place, target: Place, *, free: bool = False) -> Iterator[Receipt]:
    """Copy what the target lacks; yields each receipt as its shard stands there. With `free` the source keeps, of what
    arrived, only a note under moved/: it is still known to be done."""
    require_apart(source, target)
    contract = b"".join(source.read(CONTRACT_NAME))
    if target.size(CONTRACT_NAME) is not None and b"".join(target.read(CONTRACT_NAME)) != contract:
        raise Refused(wrong="the target holds a set of another contract", found=CONTRACT_NAME, mend="carry elsewhere")
    target.write(CONTRACT_NAME, iter([contract]))
    carry_assets(source, target)
    committed = source.names(RECEIPTS)
    carry_notes(source, target)  # those of every receipt that has just been seen, and before it
    faults: list[Fault] = []
    for name in committed:
        try:
            yield _carry_item(source, target, name, free=free)
        except (Corrupt, Refused) as fault:  # the others go on: a night's copy is not lost over one shard
            faults.append(fault)
    if faults:
        others = f", and {len(faults) - 1} other items" if len(faults) > 1 else ""
        first = faults[0]
        raise type(first)(wrong=first.wrong + others, found=first.found, mend=first.mend)


def _carry_item(source: Place, target: Place, name: str, *, free: bool) -> Receipt:
    data = b"".join(source.read(name))
    receipt, there = Receipt.from_json(data, source=name), _standing(target, name)
    if there is None or receipt.supersedes == there.digest:
        _carry_shard(source, target, receipt)
        target.write(name, iter([data]))
        if there is not None and there.stem != receipt.stem:
            _remove_shard(target, there)
        there = receipt
    _require_same(receipt, there)
    if free:
        _free(source, target, receipt, there)
    return there


def require_apart(source: Place, target: Place) -> None:
    """A set that is carried into itself and freed would be gone."""
    if source.shares(target):
        raise Refused(wrong="OUT is the set itself, or shares a folder with it", found="one folder under two names",
                      mend="name another folder")  # fmt: skip


def carry_notes(source: Place, target: Place) -> None:
    """Who asks for a record again must know what was walked with it. A note whose good ones were never committed at
    the target does not count there."""
    for name in source.names(QUARANTINE):
        mine, theirs = (_note(place, name) for place in (source, target))
        assert mine is not None, "it has just been named"
        if theirs is not None and _counts(target, theirs):
            mine = joined(theirs, mine)
        if mine != theirs:
            target.write(name, iter([mine.to_json()]))


def _note(place: Place, name: str) -> Note | None:
    return None if place.size(name) is None else Note.from_json(Path(name).stem, b"".join(place.read(name)))


def _counts(place: Place, note: Note) -> bool:
    homes = [f"{folder}/{note.shard}.json" for folder in (RECEIPTS, MOVED)]
    return note.shard is None or any(place.size(home) is not None for home in homes)


def _standing(target: Place, name: str) -> Receipt | None:
    """A damaged receipt, or one whose shard is not all there, is none."""
    if target.size(name) is None:
        return None
    try:
        receipt = Receipt.from_json(b"".join(target.read(name)), source=name)
    except Corrupt:
        return None
    sizes = {f"{SHARDS}/{receipt.stem}{part}": size for part, (size, _) in receipt.files.items()}
    return receipt if all(target.size(part) == size for part, size in sizes.items()) else None


def _require_same(receipt: Receipt, there: Receipt) -> None:
    """The same records, in whatever container, or those of a later repair."""
    if receipt.digest not in (there.digest, there.supersedes):
        raise Refused(
            wrong=f"item {receipt.item} stands at the target with other records",
            found=f"digest {there.digest[:8]} there, {receipt.digest[:8]} here",
            mend="carry into another folder, or remove the receipt of the one that is not wanted",
        )


def _carry_shard(source: Place, target: Place, receipt: Receipt) -> None:
    for part, (size, crc) in receipt.files.items():
        _carry_file(source, target, f"{SHARDS}/{receipt.stem}{part}", size, crc)


def carry_assets(source: Place, target: Place) -> None:
    names = (name for name in source.names(ASSETS) if SEALS not in Path(name).parts)  # seals go with their files
    for name in sorted(names, key=lambda name: name == VAE_CONFIG):  # that one last: harvest/assets.py
        _carry_asset(source, target, name)


def _carry_asset(source: Place, target: Place, name: str) -> None:
    """What is whole at the target stays; so does what has no seal there, unless it is the same."""
    seal, theirs = _seal_of(source, name), _seal_of(target, name)
    if theirs is not None and _is_sound(target, name, _told(target, theirs)):
        return
    is_there = theirs is None and target.size(name) is not None
    if seal is None and target.size(name) is None:
        target.write(name, source.read(name))
    elif seal is not None and not (is_there and not _is_sound(target, name, _told(source, seal))):
        _carry_file(source, target, name, *_told(source, seal))
        target.write(seal, source.read(seal))


def _told(place: Place, seal: str) -> tuple[int, int]:
    return read_seal(b"".join(place.read(seal)), seal)


def _seal_of(place: Place, name: str) -> str | None:
    """An asset's own, or that of a folder it lies in."""
    path = Path(name)
    seals = (str(folder / SEALS / f"{path.relative_to(folder)}.json") for folder in path.parents)
    return next((seal for seal in seals if place.size(seal) is not None), None)


def _is_sound(place: Place, name: str, told: tuple[int, int]) -> bool:
    return place.size(name) == told[0] and _crc(place, name) == told[1]


def _carry_file(source: Place, target: Place, name: str, size: int, crc: int) -> None:
    """One file, compared with its receipt after it has arrived; what arrived before and is whole stays."""
    if _is_sound(target, name, (size, crc)):
        return
    if source.size(name) is None:
        raise Corrupt(wrong=f"{name} is missing at the source", found="a receipt without its shard", mend="verify it")
    target.write(name, source.read(name))
    if not _is_sound(target, name, (size, crc)):
        target.remove(name)
        raise Corrupt(wrong=f"{name} did not arrive as it was written", found="another size or crc32c",
                      mend="verify the source, then run the same command again")  # fmt: skip


def _free(source: Place, target: Place, receipt: Receipt, there: Receipt) -> None:
    """Only what stands whole at the target is removed here. The note comes first; where a full disk has no room for it,
    the shard does. The receipt goes last: killed before, the same command frees the rest."""
    name = f"{RECEIPTS}/{receipt.item}.json"
    for part, (size, crc) in there.files.items():
        if _crc(target, f"{SHARDS}/{there.stem}{part}") != crc:
            target.remove(name)  # without its receipt the shard is copied again
            raise Corrupt(wrong=f"{there.stem}{part} is damaged at the target", found=f"not {size} whole bytes",
                          mend="run the same command again")  # fmt: skip
    values = {"item": there.item, "digest": there.digest, "keys": list(_keys(target, there))}
    note, data = f"{MOVED}/{receipt.item}.json", json.dumps(values).encode()
    try:
        source.write(note, iter([data]))
    except OSError as error:
        if error.errno not in FULL:
            raise
        _remove_shard(source, receipt)
        source.write(note, iter([data]))
    _remove_shard(source, receipt)
    source.remove(name)


def _remove_shard(place: Place, receipt: Receipt) -> None:
    for part in receipt.files:
        place.remove(f"{SHARDS}/{receipt.stem}{part}")


def _crc(place: Place, name: str) -> int:
    crc = 0
    for piece in place.read(name):
        crc = google_crc32c.extend(crc, piece)
    return int(crc)


def _keys(place: Place, receipt: Receipt) -> tuple[str, ...]:
    """The item's keys, from its header."""
    part = ".idx" if receipt.container == "tar" else ".zarr/zarr.json"
    values = json.loads(b"".join(place.read(f"{SHARDS}/{receipt.stem}{part}")))
    header = values["header"] if receipt.container == "tar" else values["attributes"]["shard"]
    return tuple(header["keys"])
