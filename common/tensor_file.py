"""The tensors of safetensors files: where each lies. Torch-free; nothing is mapped.

    stored = read_header(path)                 name -> StoredTensor, checked against the file's size
    files = weight_files(folder, variant)      the single file, or all that an index names; () when there are none

safetensors' own reader maps a whole file writable, which a machine with less memory than the file refuses, and the
pages count as ours until the mapping ends. A header is read here; bytes are read where they are wanted.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import BadUsage, Corrupt

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
STEMS = ("diffusion_pytorch_model", "model")
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor's bytes lie."""

    name: str
    path: Path
    offset: int
    dtype: str
    """As safetensors writes it: F32, BF16 ..."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if start > min(size, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {start} bytes in a file of {size}")
            header: dict[str, Any] = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(
                name=name,
                path=path,
                offset=start + entry["data_offsets"][0],
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
            )
            for name, entry in header.items()
        }
        ends = [tensor.offset + tensor.num_bytes for tensor in tensors.values()]
        if [start + entry["data_offsets"][1] for entry in header.values()] != ends or max(ends, default=start) != size:
            raise ValueError(f"{size} bytes, and its header tells of {max(ends, default=start)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(
            wrong="a weight file cannot be read", found=f"{path}: {error}", mend=f"fetch {path.name} again"
        ) from None
    return tensors


def weight_files(folder: Path, variant: str | None) -> tuple[Path, ...]:
    """The files that hold a component's weights in one variant; a named one that is missing is an error."""
    dot = f".{variant}" if variant else ""
    for stem in STEMS:
        single = folder / f"{stem}{dot}.safetensors"
        if single.exists():
            return (single,)
        for index in (folder / f"{stem}.safetensors.index{dot}.json", folder / f"{stem}{dot}.safetensors.index.json"):
            if index.exists():
                return _indexed(folder, index)
    return ()


def _indexed(folder: Path, index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Corrupt(wrong=f"{index} is no weight index", found=str(error), mend=f"fetch {index.name} again") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadUsage(
            wrong=f"{folder} lacks {len(missing)} of its weight files",
            found=f"no {missing[0]}",
            mend="finish the download",
        )
    return tuple(folder / name for name in names)
