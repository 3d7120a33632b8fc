"""A table of extents: where each stored piece lies in a file, and how it is read and checked.

    extents = Extents(path, offsets, length, crcs=None, name=lambda i: f"point {i}")
    extents.read(i, out)        one preadv into a buffer of yours, no copy; checked against its crc32c at first touch

Both containers come down to this: what Zarr and tar differ in is only where the table comes from.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from common.errors import Corrupt
from common.files import pieces

CRC_BYTES = 4
CLOSED = -1


def crc32c(data: Any, before: int = 0) -> int:
    """Of anything with a buffer; `before`: of what came before it, where it is a piece of something."""
    data = data if isinstance(data, bytes) else np.frombuffer(data, np.uint8)
    return int(google_crc32c.extend(before, data))


def measured(path: Path) -> tuple[int, int]:
    """Bytes and crc32c of a file, which is never whole in memory."""
    num_bytes = crc = 0
    for piece in pieces(path):
        num_bytes, crc = num_bytes + len(piece), crc32c(piece, crc)
    return num_bytes, crc


class Extents:
    """Pieces of one length in one file. `crcs` None: each piece is followed by its own four bytes of crc32c."""

    def __init__(
        self,
        path: Path,
        offsets: NDArray[np.int64],
        length: int,
        crcs: NDArray[np.uint32] | None,
        name: Callable[[int], str],
    ) -> None:
        self.path, self.offsets, self.length = path, offsets, length
        self._crcs, self._name = crcs, name
        self._checked = bytearray(len(offsets))
        """One byte a piece: a bytearray answers in a third of the time of an array."""
        self._fd = CLOSED

    def __len__(self) -> int:
        return len(self.offsets)

    def place(self, index: int) -> tuple[int, int] | None:
        """Open file and offset of a piece that was checked before: who reads many looks all of them up, then reads."""
        return (self._fd, self.offsets.item(index)) if self._checked[index] else None

    def read(self, index: int, out: memoryview) -> None:
        """Fill `out` (exactly `length` bytes) with piece `index`."""
        if self._checked[index]:  # of every read but the first: no Python to spare
            got = os.preadv(self._fd, (out,), self.offsets.item(index))
            if got != self.length:
                raise self._cut_short(index, got, self.length)
        elif self._crcs is None:
            trailer = bytearray(CRC_BYTES)
            self._pread((out, trailer), self.length + CRC_BYTES, index)
            self._compare(index, out, int.from_bytes(trailer, "little"))
        else:
            self._pread((out,), self.length, index)
            self._compare(index, out, self._crcs.item(index))

    def read_run(self, first: int, count: int) -> NDArray[np.uint8]:
        """`count` neighbouring pieces in one read, as rows."""
        stride = self.length + (CRC_BYTES if self._crcs is None else 0)
        assert (np.diff(self.offsets[first : first + count]) == stride).all(), "pieces of a run lie side by side"
        rows = np.empty((count, stride), np.uint8)
        self._pread((rows.data.cast("B"),), rows.nbytes, first)
        for row, index in enumerate(range(first, first + count)):
            if not self._checked[index]:
                tail = rows[row, self.length :].tobytes()
                expected = int.from_bytes(tail, "little") if self._crcs is None else self._crcs.item(index)
                self._compare(index, rows[row, : self.length], expected)
        return np.ascontiguousarray(rows[:, : self.length])

    def _pread(self, buffers: Sequence[Any], wanted: int, index: int) -> None:
        if self._fd == CLOSED:
            self._fd = os.open(self.path, os.O_RDONLY)
        got = os.preadv(self._fd, buffers, self.offsets.item(index))
        if got != wanted:  # a short read of a regular file is its end
            raise self._cut_short(index, got, wanted)

    def _compare(self, index: int, data: Any, expected: int) -> None:
        found = crc32c(data)
        if found != expected:
            raise self._corrupt(index, f"crc32c {found:08x}, written as {expected:08x}")
        self._checked[index] = 1

    def _cut_short(self, index: int, got: int, wanted: int) -> Corrupt:
        return self._corrupt(index, f"{got} bytes where {wanted} were written")

    def _corrupt(self, index: int, found: str) -> Corrupt:
        return Corrupt(
            wrong=f"{self._name(index)} in {self.path} is not what was written",
            found=found,
            mend="copy its shard again, or remove its receipt and shard and harvest again",
        )

    def close(self) -> None:
        if self._fd != CLOSED:
            os.close(self._fd)
            self._fd, self._checked = CLOSED, bytearray(len(self))

    def __del__(self) -> None:
        self.close()
