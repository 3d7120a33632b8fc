"""Receipts again, from the shards themselves.

    for receipt in rebuild(shards): ...

A shard says its contract, its numerics and every record's digest, so a lost or damaged receipt is made again byte for
byte; a lost tar index too. A shard whose records do not match their digests gets no receipt.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from common.errors import Corrupt
from common.files import TEMPORARY_PREFIX, write_atomic
from common.manifest import Receipt
from common.shard_header import PackedShard, record_of
from common.shard_reader import CONTAINERS
from common.shards import ShardSet, make_receipt
from common.shards_tar import INDEX_SUFFIX
from common.shards_tar import SUFFIX as TAR_SUFFIX
from common.shards_zarr import SUFFIX as ZARR_SUFFIX
from harvest.granary.verify import examine


def rebuild(shards: ShardSet) -> Iterator[Receipt | Corrupt]:
    """A receipt for every shard that has no valid one; a fault for each that cannot have one."""
    done: set[str] = set()
    for path in sorted(shards.shards_dir.iterdir()):
        if path.name.startswith(TEMPORARY_PREFIX) or path.suffix not in (ZARR_SUFFIX, TAR_SUFFIX):
            continue
        item = path.name.split("-")[0]
        if item in done or _has_receipt(shards, item):
            continue
        try:
            receipt = _from_shard(shards, path)
        except Corrupt as fault:
            yield fault
            continue
        write_atomic(shards.receipt_path(item), receipt.to_json())
        done.add(item)
        yield receipt


def _has_receipt(shards: ShardSet, item: str) -> bool:
    """A valid receipt whose shard is whole is left alone."""
    try:
        receipt = Receipt.read(shards.receipt_path(item))
    except (OSError, Corrupt):
        return False
    return next(examine(shards, receipt), None) is None


def _from_shard(shards: ShardSet, path: Path) -> Receipt:
    stem = path.with_suffix("")
    try:
        container = _container_of(path)
        shard = CONTAINERS[container].load(stem)
        _require_digests(shard, shards)
        if not re.fullmatch(rf"{shard.header.item}-[0-9a-f]{{8}}", stem.name):
            raise ValueError(f"it holds item {shard.header.item}")
    except (ValueError, KeyError, TypeError, IndexError, OSError, RuntimeError) as error:
        raise Corrupt(
            wrong=f"{path.name} gets no receipt",
            found=str(error).split("\n")[0],
            mend="harvest its item again: `python -m harvest run` does it by itself",
        ) from None
    if container == "tar" and not stem.with_suffix(INDEX_SUFFIX).exists():
        write_atomic(stem.with_suffix(INDEX_SUFFIX), CONTAINERS["tar"].pack(shard)[INDEX_SUFFIX])
    files = {
        str(part)[len(str(stem)) :]: part.read_bytes()
        for top in shards.shards_dir.glob(f"{stem.name}.*")
        for part in ([top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file()))
        if not part.name.startswith(TEMPORARY_PREFIX)  # what a killed copy left inside
    }
    receipt = make_receipt(shard, shards.contract, container, dict(sorted(files.items())))
    return replace(receipt, stem=stem.name)  # the name that it has, whatever a writer of today would call it


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
