"""A shard as a ustar file that stock webdataset reads, and its index.

    <stem>.tar    per record  <key>.json, <key>.points.npy, <key>.final.npy
                  per distinct text, before its users  t-<digest>.text.npy
    <stem>.idx    the header and the extents of every piece with its crc32c (JSON): reading needs no tar parsing

An array's own header fills a block of 512 bytes, so that its data begin at a multiple of 512: out of step, a read costs
5-9 % more. Deterministic: times, owners and modes are fixed. Members are read by strict names and never extracted.
"""

import base64
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.extents import Extents, crc32c
from common.record import Array
from common.shard_header import PackedShard, ShardHeader
from common.tables import Fail, Layout, Tables, names

SUFFIX, INDEX_SUFFIX = ".tar", ".idx"
MAX_INDEX_BYTES = 64_000_000
_BLOCK = 512
_MEMBER = re.compile(
    r"(?:(?P<key>[0-9a-f]{16})\.(?P<part>json|points\.npy|final\.npy)|t-(?P<text>[0-9a-f]{16})\.text\.npy)"
)


class TarContainer:
    """Implements common.tables.Container."""

    def pack(self, shard: PackedShard) -> dict[str, bytes]:
        buffer = io.BytesIO()
        tables = {name: _Table() for name in ("points", "final", "text")}
        header, written = shard.header, set()
        values = header.to_json()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index, key in enumerate(header.keys):
                prompt = header.prompt_of[index]
                rows = shard.text[header.text_rows(prompt)]
                text_name = _text_name(header.prompts[prompt], rows)
                if prompt not in written:
                    written.add(prompt)
                    _add_array(tar, f"{text_name}.text.npy", rows, tables["text"])
                _add(tar, f"{key}.json", _record_json(values, index, text_name))
                _add_array(tar, f"{key}.points.npy", shard.points[index], tables["points"])
                _add_array(tar, f"{key}.final.npy", shard.final[index], tables["final"], whole=True)
        index_json = {"header": values, "tables": {name: table.to_json() for name, table in tables.items()}}
        return {SUFFIX: buffer.getvalue(), INDEX_SUFFIX: json.dumps(index_json, ensure_ascii=False).encode()}

    def open(self, stem: Path, layout: Layout, fail: Fail) -> Tables:
        size, crc = layout.receipt.files[INDEX_SUFFIX]
        if size > MAX_INDEX_BYTES:
            raise fail(INDEX_SUFFIX, f"{size} bytes of JSON")
        data = stem.with_name(stem.name + INDEX_SUFFIX).read_bytes()
        if len(data) != size or crc32c(data) != crc:
            raise fail(INDEX_SUFFIX, f"{len(data)} bytes, crc32c {crc32c(data):08x}; written as {size}, {crc:08x}")
        index = json.loads(data)
        header = ShardHeader.from_json(index["header"])
        point, final, text = names(layout, header)
        path = stem.with_name(stem.name + SUFFIX)
        tar_bytes = path.stat().st_size
        if tar_bytes != layout.receipt.files[SUFFIX][0]:
            raise fail(SUFFIX, f"{tar_bytes} bytes of {layout.receipt.files[SUFFIX][0]}")

        def extents(name: str, count: int, length: int, naming: Callable[[int], str]) -> Extents:
            offsets, crcs = _Table.from_json(index["tables"][name])
            if not len(offsets) == len(crcs) == count or int(offsets.max(initial=0)) + length > tar_bytes:
                raise fail(INDEX_SUFFIX, f"{len(offsets)} extents of {name} where {count} of {length} bytes must be")
            return Extents(path, offsets, length, crcs, naming)

        return Tables(
            header=header,
            points=extents("points", layout.num_points, layout.point_bytes, point),
            final=extents("final", layout.receipt.num_records, layout.state_bytes, final),
            text=extents("text", layout.receipt.num_tokens, layout.row_bytes, text),
        )

    def load(self, stem: Path) -> PackedShard:
        """From the tar alone; the index is not needed."""
        members = dict(_members(stem.with_name(stem.name + SUFFIX)))
        records = [json.loads(data) for name, data in members.items() if name.endswith(".json")]
        shared = records[0]["shard"]
        columns = {field: [record[name] for record in records] for name, field in _PER_RECORD.items()}
        header = ShardHeader.from_json(shared | columns)
        texts = list(dict.fromkeys(record["text"] for record in records))
        return PackedShard(
            header=header,
            points=np.stack([_array(members[f"{key}.points.npy"]) for key in header.keys]),
            final=np.stack([_array(members[f"{key}.final.npy"]) for key in header.keys]),
            text=np.concatenate([_array(members[f"{text}.text.npy"]) for text in texts]),
        )


_PER_RECORD = {"key": "keys", "digest": "digests", "seed": "seeds", "prompt_number": "prompt_of",
               "timesteps": "timesteps", "sigmas": "sigmas", "expert": "expert"}  # fmt: skip
"""What a record's own JSON says -> the header's field."""


def _record_json(values: dict[str, Any], index: int, text_name: str) -> bytes:
    """What webdataset users want of a record; the first one also holds the rest of the header."""
    own = {name: values[field][index] for name, field in _PER_RECORD.items()}
    own |= {"prompt": values["prompts"][values["prompt_of"][index]], "text": text_name}
    own |= {"height": values["height"], "width": values["width"]}
    if index == 0:
        own["shard"] = {name: value for name, value in values.items() if name not in _PER_RECORD.values()}
    return json.dumps(own, ensure_ascii=False).encode()


def _text_name(prompt: str, rows: Array) -> str:
    return f"t-{hashlib.sha256(prompt.encode() + rows.tobytes()).hexdigest()[:16]}"


class _Table:
    """Offsets and checksums, gathered while the tar is written."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.crcs: list[int] = []

    def to_json(self) -> dict[str, str]:
        arrays = {"offsets": np.array(self.offsets, "<i8"), "crc32c": np.array(self.crcs, "<u4")}
        return {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()}

    @staticmethod
    def from_json(values: dict[str, str]) -> tuple[Array, Array]:
        return (np.frombuffer(base64.b64decode(values["offsets"]), "<i8"),
                np.frombuffer(base64.b64decode(values["crc32c"]), "<u4"))  # fmt: skip


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member; where its bytes begin."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    begin = tar.offset + _BLOCK
    tar.addfile(info, io.BytesIO(data))
    return begin


def _add_array(tar: tarfile.TarFile, name: str, array: Array, table: _Table, *, whole: bool = False) -> None:
    """One .npy member; its first axis (or all of it) becomes extents."""
    data = _npy_header(array) + np.ascontiguousarray(array).tobytes()
    begin = _add(tar, name, data) + len(data) - array.nbytes
    for number, piece in enumerate(array[None] if whole else array):
        piece_bytes = np.ascontiguousarray(piece).tobytes()
        table.offsets.append(begin + number * len(piece_bytes))
        table.crcs.append(crc32c(piece_bytes))


def _npy_header(array: Array) -> bytes:
    """Of the .npy format, version 1.0: spaces and a line feed fill it up to a whole block."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(array))
    magic, words = buffer.getvalue()[:8], buffer.getvalue()[10:].rstrip()
    assert len(words) < _BLOCK - 11, "at most six short axes"
    return magic + (_BLOCK - 10).to_bytes(2, "little") + words.ljust(_BLOCK - 11) + b"\n"


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Plain regular files of known names, nothing else; nothing is ever extracted."""
    file_bytes = path.stat().st_size
    with tarfile.open(path, mode="r:") as tar:
        for info in tar:
            plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not info.issparse()
            if not plain or info.size > file_bytes or not _MEMBER.fullmatch(info.name):
                raise ValueError(f"{path.name} holds {info.name!r}, which is no member of a shard")
            file = tar.extractfile(info)
            assert file is not None
            yield info.name, file.read()


def _array(data: bytes) -> Array:
    """A .npy whose header says what its bytes are; checked before anything is allocated."""
    buffer = io.BytesIO(data)
    if np.lib.format.read_magic(buffer) != (1, 0):
        raise ValueError("a .npy of another version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(buffer)
    if dtype.hasobject or fortran or int(np.prod(shape)) * dtype.itemsize != len(data) - buffer.tell():
        raise ValueError(f"a .npy that claims {dtype} {shape} in {len(data)} bytes")
    return np.frombuffer(data, dtype, offset=buffer.tell()).reshape(shape)
