"""Tensors in safetensors folders, one at a time: what diffusers wrote, and what we write.

    weights = FolderWeights(teacher_dir / "transformer")     # one file, shards with an index, or a `.fp16.` variant
    tensor = weights.tensor("proj_out.weight")
    write_atomic(path, safetensors_stream(shapes, tensors, {"format": "pt"}))
    for name, tensor in tensors_of(path): ...

Nothing larger than one tensor is in memory, whatever the folder holds.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import BadUsage, Corrupt
from common.tensor_file import StoredTensor, read_header, weight_files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class FolderWeights:
    """The tensors of one component; full-precision files are preferred to variants, where both are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = weight_files(folder, None) or weight_files(folder, "fp16")
        if not files:
            raise BadUsage(
                wrong="no weights to read",
                found=f"no *.safetensors (with its index, if in pieces) in {folder}",
                mend="give a folder in diffusers format with safetensors",
            )
        self._stored = {name: stored for file in files for name, stored in read_header(file).items()}
        self.shapes = {name: stored.shape for name, stored in self._stored.items()}

    def tensor(self, name: str) -> Tensor:
        """In float32, whatever the file's dtype."""
        return read_tensor(self._stored[name]).to(torch.float32)


def tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Of one file, each read when it is asked for."""
    return ((name, read_tensor(stored)) for name, stored in read_header(path).items())


def read_tensor(stored: StoredTensor) -> Tensor:
    tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    with open(stored.path, "rb") as stream:
        stream.seek(stored.offset)
        num_read = stream.readinto(tensor.flatten().view(torch.uint8).numpy().data)
    if num_read != tensor.nbytes:
        raise Corrupt(wrong=f"{stored.path} ends within a tensor", found=stored.name, mend="fetch the file again")
    return tensor


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
        yield tensor.to(torch.float32).contiguous().flatten().numpy().data
