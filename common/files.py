"""The one seam through which our bytes reach the disk.

    write_atomic(path, b"...")                      temporary name -> write -> fsync -> rename -> fsync of the folder
    write_new(path, b"...")                         the same, for the first who comes
    write_folder(path, {"a/b": b"...", "c": ...})   the same for a folder of files: it appears whole or not at all

A file under its final name is whole, also after a power cut. Nothing else in the product opens a file for writing
what must last (metrics.jsonl and heartbeats, which may lose their tail, use `append_line` and `replace_quietly`).
Temporary names start with TEMPORARY_PREFIX, so that readers skip them and `sweep` can clear what a kill left behind.
"""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"
PIECE_BYTES = 1 << 22
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a disk answers that is full."""
WITHOUT_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system answers that knows one name a file; there the second of two at once wins."""

Bytes = bytes | bytearray | memoryview
Content = Bytes | Iterable[Bytes]


# The four calls that fault-injection tests replace. All writing below goes through them.
def _write(fd: int, data: Bytes) -> int:
    return os.write(fd, data)


def _fsync(fd: int) -> None:
    os.fsync(fd)


def _rename(source: Path, target: Path) -> None:
    os.rename(source, target)


def _link(source: Path, target: Path) -> None:
    os.link(source, target)


def write_atomic(path: Path, content: Content) -> None:
    """Put `content` at `path`, replacing what is there: readers see the old file or the new one, never a part."""
    temporary = _temporary_beside(path)
    try:
        _write_synced(temporary, content)
        _rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def write_new(path: Path, content: Content) -> None:
    """The same where nothing stands yet: of those who come at once one succeeds, the others get FileExistsError."""
    temporary = _temporary_beside(path)
    try:
        _write_synced(temporary, content)
        try:
            _link(temporary, path)
        except OSError as error:
            if error.errno not in WITHOUT_LINKS:
                raise
            if path.exists():
                raise FileExistsError(path) from None
            _rename(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    sync_folder(path.parent)


def write_folder(path: Path, files: Mapping[str, Content | Path]) -> None:
    """Put a folder of files at `path`, which must not exist yet (FileExistsError otherwise): all of it or nothing.

    In the order of `files`. A Path is linked to, not copied.
    """
    temporary = _temporary_beside(path)
    try:
        temporary.mkdir()
        folders = {temporary}
        for name, content in files.items():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            folders.add(target.parent)
            if isinstance(content, Path):
                target.symlink_to(content)
            else:
                _write_synced(target, content)
        for folder in folders:
            sync_folder(folder)
        if path.exists():
            raise FileExistsError(path)
        _rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def set_aside(path: Path) -> Path:
    """Take what stands at `path` from its final name, for `sweep` to clear; returns where it is until then."""
    aside = _temporary_beside(path)
    _rename(path, aside)
    return aside


def replace_quietly(path: Path, content: Bytes) -> None:
    """Replace `path` in one step without waiting for the disk: for heartbeats, whose last value may be lost."""
    temporary = _temporary_beside(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def append_line(path: Path, line: str) -> None:
    """Append one line in one write call, so that lines of several processes never mix."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(fd, line.encode() + b"\n")
    finally:
        os.close(fd)


def pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes, a few at a time: content for `write_atomic` that is never whole in memory."""
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def sync_folder(path: Path) -> None:
    """Make the names in a folder last."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


def sweep(folder: Path, *, older_than_s: float) -> int:
    """Remove what killed writers left in `folder`; the age spares those who are at work. Returns how many."""
    num_removed = 0
    for entry in folder.glob(f"{TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - entry.stat().st_mtime < older_than_s:
                continue
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            num_removed += 1
    return num_removed


def _temporary_beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{os.urandom(4).hex()}-{path.name}"


def _write_synced(path: Path, content: Content) -> None:
    chunks = (content,) if isinstance(content, bytes | bytearray | memoryview) else content
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            while view:
                view = view[_write(fd, view) :]
        _fsync(fd)
    finally:
        os.close(fd)
