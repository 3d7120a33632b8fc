"""docs/format.md is enough: a reader written from that page alone, without a line of ours, finds the same values."""

import base64
import dataclasses
import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from common.manifest import Receipt
from common.record import Contract, Numerics
from common.shard_header import ShardHeader
from common.shards import ShardSet
from tests.made import NUMERICS, made_contract, made_record

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


def named(before: str, after: str) -> set[str]:
    """What stands in code quotes in a section of the page."""
    section = PAGE[PAGE.index(before) : PAGE.index(after)]
    return {word.strip() for quoted in re.findall(r"`([^`]+)`", section) for word in quoted.split(",")}


def fields_of(*kinds: Any) -> set[str]:
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


def test_the_page_names_every_field() -> None:
    header = re.findall(r"[a-z_]+", PAGE[PAGE.index("## A shard's header") : PAGE.index("`latents` are")])
    assert fields_of(Contract) <= named("## contract.json", "## A receipt")
    assert fields_of(Receipt, Numerics) <= named("## A receipt", "## A shard's header")
    assert fields_of(ShardHeader) <= set(header)


def sealed(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    body = data[len(b'{"receipt": ') : data.rindex(b', "sha256": "')]
    assert hashlib.sha256(body).hexdigest() == json.loads(data)["sha256"] and len(data) <= 2048
    receipt: dict[str, Any] = json.loads(data)["receipt"]
    return receipt


def zarr_pieces(file: Path, count: int) -> list[bytes]:
    data = file.read_bytes()
    index, crc = data[-16 * count - 4 : -4], struct.unpack("<I", data[-4:])[0]
    assert google_crc32c.value(index) == crc
    pieces = []
    for number in range(count):
        offset, length = struct.unpack_from("<QQ", index, 16 * number)
        piece = data[offset : offset + length]
        assert google_crc32c.value(piece[:-4]) == struct.unpack("<I", piece[-4:])[0]
        pieces.append(piece[:-4])
    return pieces


def tar_pieces(stem: str, table: dict[str, str], length: int) -> list[bytes]:
    data = Path(f"{stem}.tar").read_bytes()
    offsets = np.frombuffer(base64.b64decode(table["offsets"]), "<i8")
    crcs = np.frombuffer(base64.b64decode(table["crc32c"]), "<u4")
    pieces = [data[offset : offset + length] for offset in offsets]
    assert [google_crc32c.value(piece) for piece in pieces] == crcs.tolist()
    return pieces


def values_of(piece: bytes, encoding: str, shape: tuple[int, ...], names: list[str]) -> dict[str, Any]:
    n = int(np.prod(shape))
    if encoding != "int8-block64":
        dtype = {"float16": "<f2", "float32": "<f4"}[encoding]
        return dict(zip(names, np.frombuffer(piece, dtype).reshape(len(names), *shape), strict=True))
    b = -(-n // 64)
    latents = np.frombuffer(piece, "<f2", n).reshape(shape)
    if names == ["latents", "guided"]:
        values, scales = np.frombuffer(piece, np.int8, n, 2 * n), np.frombuffer(piece, "<f2", b, 3 * n)
        guided = values.astype(np.float32) * np.repeat(scales.astype(np.float32), 64)[:n]
        return {"latents": latents, "guided": guided.reshape(shape)}
    q = [np.frombuffer(piece, np.int8, n, 2 * n + i * n).astype(np.float32) for i in range(2)]
    scales = [np.frombuffer(piece, "<f2", b, 4 * n + i * 2 * b).astype(np.float32) for i in range(2)]
    uncond, difference = (q[i] * np.repeat(scales[i], 64)[:n] for i in range(2))
    return {"latents": latents, "cond": (uncond + difference).reshape(shape), "uncond": uncond.reshape(shape)}


def digest_of(fields: dict[str, Any]) -> str:
    running = hashlib.sha256()
    for name, value in fields.items():
        array = np.frombuffer(value.encode(), "|u1") if isinstance(value, str) else np.asarray(value)
        array = array.astype("<i8") if isinstance(value, int) else array
        running.update(f"{name}|{array.dtype.str}|{'x'.join(map(str, array.shape))}|".encode() + array.tobytes())
    return running.hexdigest()


@pytest.mark.parametrize("container", ["zarr", "tar"])
@pytest.mark.parametrize("encoding", ["float16", "float32", "int8-block64"])
@pytest.mark.parametrize("branches", ["both", "guided"])
def test_another_reader_finds_the_same(tmp_path: Path, container: str, encoding: str, branches: str) -> None:
    meaning = made_contract(encoding=encoding, branches=branches)
    shards = ShardSet.create(tmp_path / "set", meaning)
    shards.commit([made_record(number, meaning) for number in range(5)], NUMERICS, container=container)

    contract = json.loads((tmp_path / "set" / "contract.json").read_bytes())
    (path,) = (tmp_path / "set" / "receipts").glob("*.json")
    receipt = sealed(path)
    stem = f"{tmp_path}/set/shards/{receipt['stem']}"
    for name, (size, crc) in receipt["files"].items():
        data = Path(stem + name).read_bytes()
        assert (len(data), google_crc32c.value(data)) == (size, crc)
    canonical = json.dumps(contract, sort_keys=True, ensure_ascii=False)
    assert receipt["contract"] == hashlib.sha256(canonical.encode()).hexdigest()

    side = contract["latent_stride"]
    shape = (contract["latent_channels"], receipt["height"] // side, receipt["width"] // side)
    dtype = "<f4" if encoding == "float32" else "<f2"
    n, item = int(np.prod(shape)), np.dtype(dtype).itemsize
    names = ["latents", "guided"] if contract.get("branches") == "guided" else ["latents", "cond", "uncond"]
    assert len(names) == {"both": 3, "guided": 2}[branches]
    num_points = receipt["num_records"] * receipt["num_points"]
    if container == "zarr":
        header = json.loads(Path(f"{stem}.zarr/zarr.json").read_bytes())["attributes"]["shard"]
        name = "0.0.0" if encoding == "int8-block64" else "0.0.0.0.0.0"
        points = zarr_pieces(Path(f"{stem}.zarr/points/{name}"), num_points)
        finals = zarr_pieces(Path(f"{stem}.zarr/final/0.0.0.0"), receipt["num_records"])
        rows = zarr_pieces(Path(f"{stem}.zarr/text/0.0"), receipt["num_tokens"])
    else:
        index = json.loads(Path(f"{stem}.idx").read_bytes())
        header, tables = index["header"], index["tables"]
        int8 = 3 * n + 2 * -(-n // 64) if len(names) == 2 else 4 * n + 4 * -(-n // 64)
        point_bytes = int8 if encoding == "int8-block64" else len(names) * n * item
        points = tar_pieces(stem, tables["points"], point_bytes)
        finals = tar_pieces(stem, tables["final"], n * item)
        rows = tar_pieces(stem, tables["text"], contract["text_dim"] * item)

    assert hashlib.sha256("\n".join(header["keys"]).encode()).hexdigest()[:16] == receipt["item"]
    starts = np.concatenate([[0], np.cumsum(header["text_lengths"])])
    for r, key in enumerate(header["keys"]):
        prompt = header["prompts"][header["prompt_of"][r]]
        size = f"{receipt['height']}x{receipt['width']}"
        assert hashlib.sha256(f"{prompt}\n{header['seeds'][r]}\n{size}".encode()).hexdigest()[:16] == key
        k = receipt["num_points"]
        each = [values_of(piece, encoding, shape, names) for piece in points[r * k : (r + 1) * k]]
        text = b"".join(rows[starts[header["prompt_of"][r]] : starts[header["prompt_of"][r] + 1]])
        fields = {
            "key": key, "prompt": prompt, "seed": header["seeds"][r], "height": receipt["height"],
            "width": receipt["width"], "text": np.frombuffer(text, dtype).reshape(-1, contract["text_dim"]),
            "timesteps": np.array(header["timesteps"][r], "<f4"), "sigmas": np.array(header["sigmas"][r], "<f4"),
            "expert": np.array(header["expert"][r], "|u1"),
            **{name: np.stack([point[name] for point in each]) for name in names},
            "final": np.frombuffer(finals[r], dtype).reshape(shape),
        }  # fmt: skip
        assert digest_of(fields) == header["digests"][r]
    assert hashlib.sha256("".join(header["digests"]).encode()).hexdigest() == receipt["digest"]
    files = json.dumps(receipt["files"], sort_keys=True)
    assert receipt["stem"] == f"{receipt['item']}-{hashlib.sha256(files.encode()).hexdigest()[:8]}"
    bits = np.unpackbits(np.frombuffer(base64.b64decode(receipt["held_out"]), np.uint8), count=len(header["keys"]))
    prompts = [header["prompts"][number] for number in header["prompt_of"]]
    assert bits.tolist() == [google_crc32c.value(prompt.encode()) % 50 == 0 for prompt in prompts]
