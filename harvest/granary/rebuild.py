"""Receipts again, from the shards themselves.

    for receipt in rebuild(shards): ...

A shard says its contract, its numerics and every record's digest, so a lost or damaged receipt is made again byte for
byte (but for what a repair wrote there of the generation before); a lost tar index too. A shard whose records do not
match their digests, or whose bytes do not match its name, gets no receipt.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from common.errors import Corrupt
from common.extents import crc32c
from common.files import TEMPORARY_PREFIX, write_atomic
from common.manifest import Receipt
from common.shard_header import PackedShard, record_of
from common.shard_reader import CONTAINERS
from common.shards import ShardSet, make_receipt
from common.shards_tar import INDEX_SUFFIX
from common.shards_tar import SUFFIX as TAR_SUFFIX
from common.shards_zarr import SUFFIX as ZARR_SUFFIX
from harvest.granary.verify import examine

HARVEST_AGAIN = "harvest its item again: `python -m harvest run` does it by itself"


def rebuild(shards: ShardSet) -> Iterator[Receipt | Corrupt]:
    """A receipt for every shard that has no valid one, an index for every tar that lost its own; a fault for each that
    cannot have one. A valid receipt says what its shard was: it is never made to fit another."""
    done: set[str] = set()
    for path in sorted(shards.shards_dir.iterdir()):
        if path.name.startswith(TEMPORARY_PREFIX) or path.suffix not in (ZARR_SUFFIX, TAR_SUFFIX):
            continue
        item = path.name.split("-")[0]
        if item in done:
            continue
        try:
            receipt = _valid_receipt(shards, item)
            made = _from_shard(shards, path) if receipt is None else _with_index(shards, receipt)
        except Corrupt as fault:
            yield fault
            continue
        done.add(item)
        if made:
            yield made


def _valid_receipt(shards: ShardSet, item: str) -> Receipt | None:
    try:
        return Receipt.read(shards.receipt_path(item))
    except (OSError, Corrupt):
        return None


def _with_index(shards: ShardSet, receipt: Receipt) -> Receipt | None:
    """None: nothing was lost."""
    damages = list(examine(shards, receipt))
    if not damages:
        return None
    path = shards.shards_dir / (receipt.stem + INDEX_SUFFIX)
    if [damage.file for damage in damages] == [path.name]:
        data = CONTAINERS["tar"].pack(_loaded(shards, path.with_suffix(TAR_SUFFIX)))[INDEX_SUFFIX]
        if [len(data), crc32c(data)] == receipt.files[INDEX_SUFFIX]:
            write_atomic(path, data)
            return receipt
    raise Corrupt(wrong=f"item {receipt.item} is damaged, its receipt is not", found=str(damages[0]),
                  mend="copy its shard again, or `python -m harvest repair SET CONFIG`")  # fmt: skip


def _from_shard(shards: ShardSet, path: Path) -> Receipt:
    shard, stem, container = _loaded(shards, path), path.with_suffix(""), _container_of(path)
    files = {
        str(part)[len(str(stem)) :]: part.read_bytes()
        for top in shards.shards_dir.glob(f"{stem.name}.*")
        for part in ([top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file()))
        if not part.name.startswith(TEMPORARY_PREFIX)  # what a killed copy left inside
    }
    found = files.get(INDEX_SUFFIX)
    if container == "tar":  # no record's digest covers it; the tar says it all
        files[INDEX_SUFFIX] = CONTAINERS["tar"].pack(shard)[INDEX_SUFFIX]
    receipt = make_receipt(shard, shards.contract, container, dict(sorted(files.items())))
    if stem.name not in (receipt.stem, f"{receipt.item}-{receipt.digest[:8]}"):  # the second: of older sets
        raise Corrupt(wrong=f"{path.name} gets no receipt", found=f"its bytes would be called {receipt.stem}",
                      mend=HARVEST_AGAIN)  # fmt: skip
    if container == "tar" and found != files[INDEX_SUFFIX]:
        write_atomic(stem.with_suffix(INDEX_SUFFIX), files[INDEX_SUFFIX])
    receipt = replace(receipt, stem=stem.name)  # the name that it has, whatever a writer of today would call it
    write_atomic(shards.receipt_path(receipt.item), receipt.to_json())
    return receipt


def _loaded(shards: ShardSet, path: Path) -> PackedShard:
    """A shard without its receipt; every record is what its digest says."""
    try:
        shard = CONTAINERS[_container_of(path)].load(path.with_suffix(""))
        _require_digests(shard, shards)
        if not re.fullmatch(rf"{shard.header.item}-[0-9a-f]{{8}}", path.stem):
            raise ValueError(f"it holds item {shard.header.item}")
    except (ValueError, KeyError, TypeError, IndexError, OSError, RuntimeError) as error:
        raise Corrupt(wrong=f"{path.name} gets no receipt", found=str(error).split("\n")[0],
                      mend=HARVEST_AGAIN) from None  # fmt: skip
    return shard


def _container_of(path: Path) -> str:
    if path.suffix == TAR_SUFFIX:
        return "tar"
    codecs = json.dumps(json.loads((path / "points" / "zarr.json").read_bytes())["codecs"])
    return next((f"zarr+{name}" for name in ("zstd", "pcodec") if name in codecs), "zarr")


def _require_digests(shard: PackedShard, shards: ShardSet) -> None:
    if shard.header.contract != shards.contract.digest():
        raise ValueError(f"it was made under contract {shard.header.contract[:16]}")
    for index, digest in enumerate(shard.header.digests):
        if record_of(shard, index, shards.contract).digest() != digest:
            raise ValueError(f"record {shard.header.keys[index]} does not match its digest")
