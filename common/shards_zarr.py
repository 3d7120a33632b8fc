"""A shard as a Zarr v3 group that stock clients read.

    <name>.zarr/zarr.json      attributes: the shard's header (keys, prompts, seeds, timesteps, digests ...)
               points/         [record, point, field, channel, y, x], one shard file, inner chunk = one point
               final/          [record, channel, y, x], inner chunk = one record
               text/           [token, width], the distinct prompts one after the other, inner chunk = one token

Packed by zarr-python into memory; common/files puts the bytes on disk. Every inner chunk carries its crc32c, and an
inner chunk that equals the fill value is written all the same: to Zarr a missing chunk is a chunk of fill values.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.extents import CRC_BYTES, Extents, crc32c
from common.record import Record
from common.shard_header import FIELDS, ShardHeader

SUFFIX = ".zarr"
POINTS, FINAL, TEXT = "points", "final", "text"
HEADER_FILE = "zarr.json"
_DATA_FILES = {POINTS: "points/0.0.0.0.0.0", FINAL: "final/0.0.0.0", TEXT: "text/0.0"}


def pack(records: Sequence[Record], header: ShardHeader, dtype: np.dtype[Any]) -> dict[str, bytes]:
    """The files of a shard: name -> bytes. The same records give the same bytes."""
    import zarr
    from zarr.storage import MemoryStore

    store = MemoryStore()
    group = zarr.create_group(store, attributes={"shard": header.to_attributes()})
    points = np.stack([np.stack([getattr(record, field) for field in FIELDS], axis=1) for record in records])
    _put(group, POINTS, points.astype(dtype, copy=False), inner=(1, 1, *points.shape[2:]))
    final = np.stack([record.final for record in records])
    _put(group, FINAL, final.astype(dtype, copy=False), inner=(1, *final.shape[1:]))
    by_prompt = {record.prompt: record.text for record in records}
    text = np.concatenate([by_prompt[prompt] for prompt in header.prompts])
    _put(group, TEXT, text.astype(dtype, copy=False), inner=(1, text.shape[1]))
    return {name: buffer.to_bytes() for name, buffer in sorted(store._store_dict.items())}


def _put(group: Any, name: str, array: Any, *, inner: tuple[int, ...]) -> None:
    from zarr.codecs import Crc32cCodec

    stored = group.create_array(
        name,
        shape=array.shape,
        dtype=array.dtype,
        shards=array.shape,
        chunks=inner,
        compressors=[Crc32cCodec()],
        fill_value=np.nan,
        chunk_key_encoding={"name": "v2", "separator": "."},
        config={"write_empty_chunks": True},
    )
    stored[...] = array


def read_header(
    shard: Path, files: Mapping[str, Sequence[int]], corrupt: Callable[[str, str], Exception]
) -> ShardHeader:
    """The header, after every small file of the shard was checked against its receipt."""
    for name, (size, crc) in files.items():
        if not name.endswith(HEADER_FILE):
            continue
        data = (shard / name).read_bytes()
        if len(data) != size or crc32c(data) != crc:
            raise corrupt(name, f"{len(data)} bytes, crc32c {crc32c(data):08x}; written as {size}, {crc:08x}")
        if name == HEADER_FILE:
            attributes = json.loads(data)["attributes"]["shard"]
    return ShardHeader.from_attributes(attributes)


def extents(
    shard: Path,
    field: str,
    count: int,
    length: int,
    name: Callable[[int], str],
    corrupt: Callable[[str, str], Exception],
) -> Extents:
    """The extents of `points`, `final` or `text`, from the index at the end of the shard file: `count` pairs of
    64-bit offset and length, then the index's own crc32c (Zarr ZEP 2)."""
    path = shard / _DATA_FILES[field]
    index_bytes = count * 16
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if size != index_bytes + CRC_BYTES + count * (length + CRC_BYTES):
            raise corrupt(_DATA_FILES[field], f"{size} bytes, which do not hold {count} pieces of {length}")
        file.seek(size - index_bytes - CRC_BYTES)
        tail = file.read()
    index, crc = tail[:-CRC_BYTES], int.from_bytes(tail[-CRC_BYTES:], "little")
    if crc32c(index) != crc:
        raise corrupt(_DATA_FILES[field], "its index does not match its crc32c")
    table = np.frombuffer(index, "<u8").reshape(count, 2)
    if not (table[:, 1] == length + CRC_BYTES).all() or int(table[:, 0].max(initial=0)) > size:
        raise corrupt(_DATA_FILES[field], "its index points to pieces of another size")
    return Extents(path, table[:, 0].astype(np.int64), length, None, name)
