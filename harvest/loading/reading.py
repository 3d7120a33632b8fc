"""Stored tensors into memory: read and cast by several threads, or mapped.

filled = fill(sources, dtype_of, Arriving("transformer", sources, moved), hands, put)
filled = map_in(sources, Arriving(...), hands, put, touched=True)       over the pages of files that are as wanted

    same dtype: read straight into place;  another: through a small staging buffer a thread, cast into place
"""

import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from common.errors import Corrupt
from common.extents import crc32c
from common.tensor_file import StoredTensor
from harvest.loading.hands import Hands
from harvest.loading.identity import digest_line

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
STAGING_BYTES = 1 << 20
"""Small enough that a piece is cast and looked at while it is in the cache."""
TOUCHED_BYTES = 16 << 20
Moved = Callable[..., None]
Put = Callable[[str, Tensor], Tensor]


NO_CRCS: Mapping[str, int] = {}


class Hearer(Protocol):
    def update(self, data: memoryview, /) -> None: ...


class Crc:
    """Of one tensor, while it comes."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview, /) -> None:
        self._value = crc32c(data, self._value)

    def require(self, stored: StoredTensor, told: int | None) -> None:
        if told not in (None, self._value):
            raise Corrupt(
                wrong=f"{stored.path} is not what was prepared",
                found=f"{stored.name}: crc32c {self._value:08x} for {told:08x}",
                mend="remove prepared.json of that folder: the next run prepares it again",
            )


class Arriving:
    """The bytes of one component, counted as they come."""

    def __init__(self, part: str, sources: Mapping[str, StoredTensor], moved: Moved) -> None:
        self._part, self._moved = part, moved
        self._total, self._done = sum(stored.num_bytes for stored in sources.values()), 0
        self._lock = threading.Lock()

    def tell(self, stored: StoredTensor, num_bytes: int = 0) -> None:
        """So many more have come of this tensor's file."""
        with self._lock:
            self._done += num_bytes
            self._moved(loading=self._part, file=stored.path.name, bytes_read=self._done, bytes_total=self._total)


def fill(
    sources: Mapping[str, StoredTensor],
    dtype_of: Callable[[str], torch.dtype],
    arriving: Arriving,
    pool: Hands,
    put: Put,
    digests: dict[str, str] | None = None,
    crcs: Mapping[str, int] = NO_CRCS,
) -> dict[str, Tensor]:
    """Every tensor in its dtype, read and cast by several threads; compared with its crc32c, if there is one."""

    def one(name: str) -> tuple[str, Tensor]:
        running, crc = hashlib.sha256() if digests is not None else None, Crc()
        hearers = [hearer for hearer, wanted in ((running, True), (crc, name in crcs)) if hearer and wanted]
        arriving.tell(sources[name])
        tensor = read_tensor(sources[name], dtype_of(name), hearers)
        crc.require(sources[name], crcs.get(name))
        if digests is not None and running is not None:
            digests[name] = digest_line(tensor, running.hexdigest())
        arriving.tell(sources[name], sources[name].num_bytes)
        return name, put(name, tensor)

    return dict(pool.map(one, in_one_sweep(sources)))


def map_in(
    sources: Mapping[str, StoredTensor], arriving: Arriving, pool: Hands, put: Put, *, touched: bool,
    crcs: Mapping[str, int] = NO_CRCS,
) -> dict[str, Tensor]:  # fmt: skip
    """Every tensor over its file's own pages; touched: all of them are brought into memory, and compared with its
    crc32c, if there is one."""
    mapped = mapped_tensors(sources)

    def one(name: str) -> tuple[str, Tensor]:
        flat, crc = mapped[name].view(-1).view(torch.uint8), Crc()
        for start in range(0, flat.numel() if touched else 0, TOUCHED_BYTES):
            arriving.tell(sources[name])
            piece = flat[start : start + TOUCHED_BYTES]
            crc.update(piece.numpy().data) if name in crcs else piece[:: mmap.PAGESIZE].max()
            arriving.tell(sources[name], len(piece))
        if touched:
            crc.require(sources[name], crcs.get(name))
        return name, put(name, mapped[name])

    return dict(pool.map(one, in_one_sweep(sources)))


def in_one_sweep(sources: Mapping[str, StoredTensor]) -> list[str]:
    """By file and offset: the disk sees them one after the other."""
    return sorted(sources, key=lambda name: (str(sources[name].path), sources[name].offset))


def mapped_tensors(sources: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Tensors over the files' own pages, which every process that maps them shares; nobody writes to them."""
    paths = {stored.path for stored in sources.values()}
    maps = {path: torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8) for path in paths}

    def piece(stored: StoredTensor) -> Tensor:
        data = maps[stored.path][stored.offset : stored.offset + stored.num_bytes]
        return data.view(TORCH_DTYPES[stored.dtype]).view(stored.shape)

    return {name: piece(stored) for name, stored in sources.items()}


def read_tensor(stored: StoredTensor, dtype: torch.dtype, hearers: Sequence[Hearer] = ()) -> Tensor:
    """One tensor, finite: straight into place, or through a staging buffer that is cast piece by piece; `hearers` are
    told what was kept."""
    source_dtype = TORCH_DTYPES[stored.dtype]
    target = source_dtype if not source_dtype.is_floating_point else dtype
    tensor = torch.empty(stored.shape, dtype=target)
    flat = tensor.view(-1)
    step = STAGING_BYTES // source_dtype.itemsize
    in_place = source_dtype == target
    staging = flat[:0] if in_place else torch.empty(min(step, flat.numel()), dtype=source_dtype)
    fd = os.open(stored.path, os.O_RDONLY)
    try:
        for start in range(0, flat.numel(), step):
            place = flat[start : start + step]
            piece = place if in_place else staging[: len(place)]
            _read_into(fd, stored, start * source_dtype.itemsize, piece.view(torch.uint8).numpy().data)
            if not in_place:
                place.copy_(piece)
            _require_finite(stored, piece, place)
            for hearer in hearers:
                hearer.update(place.view(torch.uint8).numpy().data)
    finally:
        os.close(fd)
    return tensor


def _require_finite(stored: StoredTensor, read: Tensor, kept: Tensor) -> None:
    """As it was read and as it is kept: a float32 weight may be too large for float16."""
    for piece in (read, kept) if kept.dtype == torch.float16 else (read,):
        # The sum tells at once; where it overflows by itself each value is looked at.
        if piece.is_floating_point() and not torch.isfinite(piece.sum()) and not torch.isfinite(piece).all():
            raise Corrupt(
                wrong=f"{stored.path.parent.name} holds NaN or Inf" + ("" if read is piece else " in float16"),
                found=stored.name,
                mend=f"fetch {stored.path.name} again" if read is piece else "compute in bfloat16 or float32",
            )


def _read_into(fd: int, stored: StoredTensor, skip: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], stored.offset + skip + done)
        if got == 0:
            raise Corrupt(wrong=f"{stored.path} ends within {stored.name}", found=f"{done} of {len(view)} bytes",
                          mend=f"fetch {stored.path.name} again")  # fmt: skip
        done += got
