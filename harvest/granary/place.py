"""Where a set lies, as what carries it sees it.

    place = LocalPlace(Path("/sets/cats"))
    place.names("receipts")

Six small methods: an object store is another class of them.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from common.files import pieces, sweep, write_atomic
from common.shards import LEFT_OVER_AFTER_S, RECEIPTS, SHARDS


class Place(Protocol):
    """Somewhere that holds files by name."""

    def names(self, prefix: str) -> list[str]:
        """Of all files below a folder, sorted."""

    def read(self, name: str) -> Iterator[bytes]: ...

    def write(self, name: str, content: Iterator[bytes]) -> None:
        """Whole or not at all."""

    def size(self, name: str) -> int | None: ...

    def remove(self, name: str) -> None: ...

    def shares(self, other: "Place") -> bool:
        """Whether what is removed here is gone there."""


class LocalPlace:
    """A folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self, prefix: str) -> list[str]:
        files = (path for path in (self.root / prefix).rglob("*") if path.is_file())
        names = (path.relative_to(self.root) for path in files)
        return sorted(str(name) for name in names if not any(part.startswith(".") for part in name.parts))

    def read(self, name: str) -> Iterator[bytes]:
        return pieces(self.root / name)

    def write(self, name: str, content: Iterator[bytes]) -> None:
        write_atomic(self.root / name, content)

    def size(self, name: str) -> int | None:
        path = self.root / name
        return path.stat().st_size if path.is_file() else None

    def remove(self, name: str) -> None:
        path = self.root / name
        path.unlink(missing_ok=True)
        for folder in path.parents:  # a Zarr shard is a folder: it goes with its last file
            if folder.parent.name == SHARDS or folder.parent.parent.name == SHARDS:
                with contextlib.suppress(OSError):
                    sweep(folder, older_than_s=LEFT_OVER_AFTER_S)  # of a copy that was killed
                    folder.rmdir()

    def shares(self, other: Place) -> bool:
        """Also under another name, of the folder or of those in it."""
        return isinstance(other, LocalPlace) and any(
            os.path.samefile(self.root / name, other.root / name)
            for name in ("", RECEIPTS, SHARDS)
            if (self.root / name).exists() and (other.root / name).exists()
        )
