"""Tensors in safetensors folders, one at a time: what diffusers wrote, and what we write.

    weights = FolderWeights(teacher_dir / "transformer")     # one file, shards with an index, or a `.fp16.` variant
    tensor = weights.tensor("proj_out.weight")
    write_atomic(path, safetensors_stream(shapes, tensors, {"format": "pt"}))

Nothing larger than one tensor is in memory, whatever the folder holds.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import BadUsage, Corrupt

INDEX_SUFFIX = ".safetensors.index"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Where a tensor's bytes lie."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class FolderWeights:
    """The tensors of one component; full-precision files are preferred to variants, where both are there.

    Read, not mapped: safetensors' own reader maps a whole file writable, which a machine with less memory than the
    file refuses (57 GB of a 14B model in one file), and pages once read would count as ours until the mapping ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._extents = {name: extent for file in self._files() for name, extent in read_header(file).items()}
        self.shapes = {name: extent.shape for name, extent in self._extents.items()}

    def tensor(self, name: str) -> Tensor:
        """In float32, whatever the file's dtype."""
        extent = self._extents[name]
        tensor = torch.empty(extent.shape, dtype=extent.dtype)
        with open(extent.file, "rb") as stream:
            stream.seek(extent.offset)
            num_read = stream.readinto(tensor.flatten().view(torch.uint8).numpy().data)
        if num_read != tensor.nbytes:
            raise Corrupt(wrong=f"{extent.file} ends within a tensor", found=name, mend="fetch the file again")
        return tensor.to(torch.float32)

    def _files(self) -> list[Path]:
        indexes = sorted(self.folder.glob(f"*{INDEX_SUFFIX}*.json"), key=_variant_last)
        files = sorted(self.folder.glob("*.safetensors"), key=_variant_last)
        if indexes:
            return self._indexed(indexes[0])
        if not files:
            raise BadUsage(wrong="no weights to read", found=f"no *.safetensors in {self.folder}",
                           mend="give a folder in diffusers format with safetensors")  # fmt: skip
        if "-of-" in files[0].name:
            raise BadUsage(wrong="weights in pieces without their index", found=str(files[0]),
                           mend=f"fetch the *{INDEX_SUFFIX}.json that belongs to them")  # fmt: skip
        return files[:1]

    def _indexed(self, index: Path) -> list[Path]:
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise Corrupt(wrong="a weight index cannot be read", found=f"{index}: {error!r}",
                          mend="fetch the file again") from None  # fmt: skip
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise BadUsage(wrong=f"{self.folder} lacks {len(missing)} of its weight files", found=f"no {missing[0]}",
                           mend="finish the download")  # fmt: skip
        return [self.folder / name for name in names]


def read_header(file: Path) -> dict[str, Extent]:
    """Every tensor of a safetensors file, checked against the file's size."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(start, size) - 8))
        header.pop("__metadata__", None)
        extents = {
            name: Extent(
                file=file,
                offset=start + entry["data_offsets"][0],
                dtype=DTYPES[entry["dtype"]],
                shape=tuple(entry["shape"]),
            )
            for name, entry in header.items()
        }
        ends = [extent.offset + extent.dtype.itemsize * math.prod(extent.shape) for extent in extents.values()]
        if [start + entry["data_offsets"][1] for entry in header.values()] != ends or max(ends, default=start) != size:
            raise ValueError(f"{size} bytes, and its header tells of {max(ends, default=start)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(wrong="a weight file cannot be read", found=f"{file}: {error!r}",
                      mend="fetch the file again") from None  # fmt: skip
    return extents


def _variant_last(file: Path) -> tuple[int, str]:
    """A variant's file names, indexes included, have one dot more: `x.safetensors` before `x.fp16.safetensors`."""
    return file.name.count("."), file.name


def safetensors_stream(
    shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of a float32 safetensors file whose tensors come one by one, in the order of `shapes`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for (expected, shape), (name, tensor) in zip(shapes.items(), tensors, strict=True):
        assert name == expected and tuple(tensor.shape) == shape, f"{name} {tuple(tensor.shape)} for {expected} {shape}"
        yield tensor.to(torch.float32).contiguous().numpy().data
