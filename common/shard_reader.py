"""One committed shard, opened for reading.

reader = open_shard(shards_dir, receipt, contract)                by offset: the fast way
reader = open_shard(shards_dir, receipt, contract, library=True)  through zarr-python or tarfile: the oracle, and
                                                                  the only way into an archive
reader.read_point(record, point, out)      the stored bytes of one point into your buffer
reader.read_text(prompt)                   [L, D]
reader.record(i)                           a whole Record
read_keys(shards_dir, receipt)             of its records, from one small file: where nothing else is wanted
"""

import json
from pathlib import Path
from typing import Protocol

import numpy as np

from common.errors import Corrupt
from common.extents import crc32c, measured
from common.manifest import Receipt
from common.record import Array, Contract, Record, item_id
from common.shard_header import PackedShard, ShardHeader, make_record, record_of
from common.shards_tar import INDEX_SUFFIX, TarContainer
from common.shards_zarr import HEADER_FILE, MAX_JSON_BYTES, SUFFIX, ZarrContainer
from common.tables import Container, Layout, Tables

CONTAINERS: dict[str, Container] = {
    "zarr": ZarrContainer(),
    "tar": TarContainer(),
    "zarr+zstd": ZarrContainer("zstd"),
    "zarr+pcodec": ZarrContainer("pcodec"),
}
GROUP_FILE = f"{SUFFIX}/{HEADER_FILE}"
ARCHIVES = ("zarr+zstd", "zarr+pcodec")


class ShardReader(Protocol):
    receipt: Receipt
    header: ShardHeader
    layout: Layout

    def read_point(self, record: int, point: int, out: memoryview) -> None:
        """The stored bytes of one point (layout.point_bytes of them) into `out`."""

    def read_text(self, prompt: int) -> Array:
        """[L, D] of a distinct prompt."""

    def read_final(self, record: int) -> Array:
        """[C, H, W]"""

    def packed(self) -> PackedShard:
        """All of it in memory."""

    def record(self, index: int) -> Record: ...


def open_shard(shards_dir: Path, receipt: Receipt, contract: Contract, *, library: bool = False) -> ShardReader:
    if library or receipt.container in ARCHIVES:
        return LibraryReader(shards_dir, receipt, contract)
    return OffsetReader(shards_dir, receipt, contract)


def read_keys(shards_dir: Path, receipt: Receipt) -> tuple[str, ...]:
    """The file that holds the header is checked like any other; and an item's name is the hash of its keys."""
    name = next(name for name in (GROUP_FILE, INDEX_SUFFIX) if name in receipt.files)
    try:
        if receipt.files[name][0] > MAX_JSON_BYTES:
            raise ValueError(f"{receipt.files[name][0]} bytes of JSON")
        data = (shards_dir / (receipt.stem + name)).read_bytes()
        if [len(data), crc32c(data)] != receipt.files[name]:
            raise ValueError(f"{name} is not what was written")
        values = json.loads(data)
        keys = tuple((values["attributes"]["shard"] if name == GROUP_FILE else values["header"])["keys"])
        if item_id(list(keys)) != receipt.item:
            raise ValueError("the keys in it are others than those of its item")
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise damaged(receipt, "its header or index", str(error)) from None
    return keys


def check_records(reader: ShardReader) -> None:
    """Read every record and compare its digest; raise Corrupt at the first that is not what was written."""
    for index, digest in enumerate(reader.header.digests):
        if reader.record(index).digest() != digest:
            raise damaged(reader.receipt, f"record {reader.header.keys[index]}", "another digest than when written")


def damaged(receipt: Receipt, part: str, found: str) -> Corrupt:
    return Corrupt(
        wrong=f"item {receipt.item} ({receipt.stem}): {part} is not what was written",
        found=found,
        mend="copy its shard again, or remove its receipt and shard and harvest again",
    )


class OffsetReader:
    """Extents, read by preadv."""

    def __init__(self, shards_dir: Path, receipt: Receipt, contract: Contract) -> None:
        self.receipt, self._contract = receipt, contract
        self.layout = Layout.of(receipt, contract)
        container = CONTAINERS[receipt.container]
        try:
            self.tables: Tables = container.open(shards_dir / receipt.stem, self.layout, self._damaged)
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise self._damaged("its header or index", str(error)) from None
        self.header = self.tables.header
        _require_fit(self.header, receipt)
        self._num_points, self._read = receipt.num_points, self.tables.points.read

    def read_point(self, record: int, point: int, out: memoryview) -> None:
        self._read(record * self._num_points + point, out)

    def read_text(self, prompt: int) -> Array:
        rows = self.header.text_rows(prompt)
        return self.tables.text.read_run(rows.start, rows.stop - rows.start).view(self.layout.state_dtype)

    def packed(self) -> PackedShard:
        return PackedShard(
            header=self.header,
            points=np.stack([self._points(index) for index in range(self.receipt.num_records)]),
            final=np.stack([self.read_final(index) for index in range(self.receipt.num_records)]),
            text=np.concatenate([self.read_text(prompt) for prompt in range(len(self.header.prompts))]),
        )

    def record(self, index: int) -> Record:
        """Only this record is read."""
        points, final = self._points(index), self.read_final(index)
        text = self.read_text(self.header.prompt_of[index])
        return make_record(self.header, index, self._contract, points=points, final=final, text=text)

    def _points(self, index: int) -> Array:
        points = np.empty((self.receipt.num_points, *self.layout.encoding.point_shape), self.layout.encoding.dtype)
        for point in range(self.receipt.num_points):
            self.read_point(index, point, points[point].data.cast("B"))
        return points

    def read_final(self, record: int) -> Array:
        final = np.empty(self.layout.state_shape, self.layout.state_dtype)
        self.tables.final.read(record, final.data.cast("B"))
        return final

    def _damaged(self, part: str, found: str) -> Corrupt:
        return damaged(self.receipt, part, found)


class LibraryReader:
    """The format's own library, a whole shard at a time; every record is checked when the shard is opened."""

    def __init__(self, shards_dir: Path, receipt: Receipt, contract: Contract) -> None:
        self.receipt, self._contract = receipt, contract
        self.layout = Layout.of(receipt, contract)
        try:
            _require_headers(shards_dir, receipt)
            self._shard = CONTAINERS[receipt.container].load(shards_dir / receipt.stem)
        except (ValueError, KeyError, TypeError, IndexError, OSError, RuntimeError) as error:
            raise damaged(receipt, "its container", str(error).split("\n")[0]) from None
        self.header = self._shard.header
        _require_fit(self.header, receipt)
        check_records(self)

    def read_point(self, record: int, point: int, out: memoryview) -> None:
        out[:] = np.ascontiguousarray(self._shard.points[record, point]).data.cast("B")

    def read_text(self, prompt: int) -> Array:
        return self._shard.text[self.header.text_rows(prompt)]

    def read_final(self, record: int) -> Array:
        final: Array = self._shard.final[record]
        return final

    def packed(self) -> PackedShard:
        return self._shard

    def record(self, index: int) -> Record:
        return record_of(self._shard, index, self._contract)


def _require_headers(shards_dir: Path, receipt: Receipt) -> None:
    """What says how the arrays are to be read; of themselves the records' digests say it."""
    for name, path in receipt.paths(shards_dir).items():
        if name.endswith("zarr.json") and list(measured(path)) != receipt.files[name]:
            raise ValueError(f"{name} is not what was written")


def _require_fit(header: ShardHeader, receipt: Receipt) -> None:
    """The header is the one that the receipt committed."""
    shape = (receipt.num_records, receipt.num_points)
    if header.item != receipt.item or header.timesteps.shape != shape or header.sigmas.shape != shape:
        raise damaged(receipt, "its header", f"item {header.item} with {header.timesteps.shape} points")
    if sum(header.text_lengths) != receipt.num_tokens or header.contract != receipt.contract:
        raise damaged(receipt, "its header", "other texts or another contract")
