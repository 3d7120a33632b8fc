"""A shard as a Zarr v3 group that stock clients read.

    <stem>.zarr/zarr.json      attributes: the shard's header (keys, prompts, seeds, timesteps, digests ...)
                points/        [record, point, field, channel, y, x], one shard file, inner chunk = one point
                final/         [record, channel, y, x], inner chunk = one record
                text/          [token, width], the distinct prompts one after the other, inner chunk = one token

Packed by zarr-python into memory; common/files puts the bytes on disk. Every inner chunk carries its crc32c, and an
inner chunk that equals the fill value is written all the same: to Zarr a missing chunk is a chunk of fill values.
Points begin at multiples of 512 bytes, as the shard's own index says: out of step, a read costs 5-9 % more.
`compression` (zstd, or pcodec, which only zarr-python reads) makes an archive: read through the library, not by offset.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.extents import CRC_BYTES, Extents, crc32c
from common.record import Array
from common.shard_header import PackedShard, ShardHeader
from common.tables import Fail, Layout, Tables, names

SUFFIX = ".zarr"
HEADER_FILE = "zarr.json"
MAX_JSON_BYTES = 64_000_000
ALIGNMENT = 512
COMPRESSIONS = ("", "zstd", "pcodec")
_ARRAYS = ("points", "final", "text")


class ZarrContainer:
    """Implements common.tables.Container."""

    def __init__(self, compression: str = "") -> None:
        assert compression in COMPRESSIONS
        self.compression = compression

    def pack(self, shard: PackedShard) -> dict[str, bytes]:
        import zarr
        from zarr.storage import MemoryStore

        store = MemoryStore()
        group = zarr.create_group(store, attributes={"shard": shard.header.to_json()})
        for name in _ARRAYS:
            array = getattr(shard, name)
            inner = {"points": (1, 1, *array.shape[2:]), "final": (1, *array.shape[1:]), "text": (1, *array.shape[1:])}
            self._put(group, name, array, inner[name])
        files = {f"{SUFFIX}/{name}": buffer.to_bytes() for name, buffer in sorted(store._store_dict.items())}
        if not self.compression:
            (name,) = (name for name in files if name.startswith(f"{SUFFIX}/points/0"))
            files[name] = aligned(files[name], int(np.prod(shard.points.shape[:2])))
        return files

    def _put(self, group: Any, name: str, array: Array, inner: tuple[int, ...]) -> None:
        stored = group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            shards=array.shape,
            chunks=inner,
            fill_value=255 if array.dtype == np.uint8 else np.nan,
            chunk_key_encoding={"name": "v2", "separator": "."},
            config={"write_empty_chunks": True},
            **self._codecs(array.dtype),
        )
        stored[...] = array

    def _codecs(self, dtype: np.dtype) -> dict[str, Any]:
        from zarr.codecs import Crc32cCodec, ZstdCodec

        if self.compression == "zstd":
            return {"compressors": [ZstdCodec(level=5), Crc32cCodec()]}
        if self.compression == "pcodec" and dtype != np.uint8:
            from zarr.codecs.numcodecs import PCodec

            return {"serializer": PCodec(level=8), "compressors": [Crc32cCodec()]}
        return {"compressors": [Crc32cCodec()]}

    def open(self, stem: Path, layout: Layout, fail: Fail) -> Tables:
        folder = stem.with_name(stem.name + SUFFIX)
        header = _checked_header(folder, layout, fail)
        point, final, text = names(layout, header)
        receipt = layout.receipt

        def extents(name: str, rank: int, count: int, length: int, naming: Callable[[int], str]) -> Extents:
            return _extents(folder / name / ".".join("0" * rank), count, length, naming, fail)

        rank = 2 + len(layout.encoding.point_shape)
        return Tables(
            header=header,
            points=extents("points", rank, layout.num_points, layout.point_bytes, point),
            final=extents("final", 4, receipt.num_records, layout.state_bytes, final),
            text=extents("text", 2, receipt.num_tokens, layout.row_bytes, text),
        )

    def load(self, stem: Path) -> PackedShard:
        import zarr

        group: Any = zarr.open_group(stem.with_name(stem.name + SUFFIX), mode="r")
        _require_bounded(stem.with_name(stem.name + SUFFIX), group)
        header = ShardHeader.from_json(group.attrs["shard"])
        return PackedShard(header=header, **{name: group[name][...] for name in _ARRAYS})


def aligned(file: bytes, count: int) -> bytes:
    """A shard file of `count` inner chunks of one length, each moved to the next multiple of ALIGNMENT."""
    table = np.frombuffer(file, "<u8", 2 * count, len(file) - 16 * count - CRC_BYTES).reshape(count, 2)
    length = int(table[0, 1])
    step = -(-length // ALIGNMENT) * ALIGNMENT
    moved = np.zeros(count * step, np.uint8)
    index = np.stack([np.arange(count, dtype="<u8") * step, table[:, 1]], axis=1).tobytes()
    for number, begin in enumerate(table[:, 0].tolist()):
        moved[number * step : number * step + length] = np.frombuffer(file, np.uint8, length, begin)
    return b"".join([moved.data, index, crc32c(index).to_bytes(CRC_BYTES, "little")])


def _checked_header(folder: Path, layout: Layout, fail: Fail) -> ShardHeader:
    """The header, after every small file of the shard was checked against its receipt."""
    attributes: dict[str, Any] = {}
    for name, (size, crc) in layout.receipt.files.items():
        part = name.removeprefix(f"{SUFFIX}/")
        if not part.endswith(HEADER_FILE):
            continue
        if size > MAX_JSON_BYTES:
            raise fail(part, f"{size} bytes of JSON")
        data = (folder / part).read_bytes()
        if len(data) != size or crc32c(data) != crc:
            raise fail(part, f"{len(data)} bytes, crc32c {crc32c(data):08x}; written as {size}, {crc:08x}")
        if part == HEADER_FILE:
            attributes = json.loads(data)["attributes"]["shard"]
    return ShardHeader.from_json(attributes)


def _extents(path: Path, count: int, length: int, name: Callable[[int], str], fail: Fail) -> Extents:
    """From the index at the end of a shard file: `count` pairs of 64-bit offset and length, then the index's own
    crc32c (ZEP 2, sharding codec)."""
    part = f"{path.parent.name}/{path.name}"
    index_bytes = count * 16
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        packed_bytes = index_bytes + CRC_BYTES + count * (length + CRC_BYTES)
        if not packed_bytes <= size < packed_bytes + count * ALIGNMENT:
            raise fail(part, f"{size} bytes, which do not hold {count} pieces of {length}")
        file.seek(size - index_bytes - CRC_BYTES)
        tail = file.read()
    index, crc = tail[:-CRC_BYTES], int.from_bytes(tail[-CRC_BYTES:], "little")
    if crc32c(index) != crc:
        raise fail(part, "its index does not match its crc32c")
    table = np.frombuffer(index, "<u8").reshape(count, 2)
    last = size - index_bytes - length - 2 * CRC_BYTES
    if not (table[:, 1] == length + CRC_BYTES).all() or int(table[:, 0].max(initial=0)) > last:
        raise fail(part, "its index points to pieces of another size")
    return Extents(path, table[:, 0].astype(np.int64), length, None, name)


def _require_bounded(folder: Path, group: Any) -> None:
    """Metadata may claim any size; what is on disk bounds it. Codecs here never shrink data below a thousandth."""
    for name in _ARRAYS:
        on_disk = sum(path.stat().st_size for path in (folder / name).iterdir())
        if group[name].nbytes > 1000 * on_disk:
            raise ValueError(f"{name} claims {group[name].nbytes} bytes; its files have {on_disk}")
