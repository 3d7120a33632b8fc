"""Files that stand beside shards, or alone, and how they are known to be what was left there.

    leave(folder, "vae/config.json", content)      once: what is there is kept
    replace(folder, "model.safetensors", content)
    path = sound(folder, "vae")                    of a file or a folder, after all its bytes were compared
    write_folder(folder, {**files, **seals_of(files)})      of a folder that appears whole

    <name>    seals/<name>.json   {"bytes": 1234, "crc32c": 567}

A seal comes after its file, and is made by reading it. A file without one is of an older release, or somebody else's:
it is taken as it is.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from common.errors import Corrupt
from common.extents import crc32c, measured
from common.files import Content, write_atomic, write_new

SEALS = "seals"


def leave(folder: Path, name: str, content: Content) -> None:
    """Of two at once, the first has left it."""
    if not (folder / name).exists():
        with contextlib.suppress(FileExistsError):
            write_new(folder / name, content)
    if not _seal_path(folder, name).exists():
        _seal(folder, name)


def replace(folder: Path, name: str, content: Content) -> None:
    _seal_path(folder, name).unlink(missing_ok=True)
    write_atomic(folder / name, content)
    _seal(folder, name)


def seals_of(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """What stands beside them when they are sealed."""
    return {f"{SEALS}/{name}.json": _told(len(data), crc32c(data)) for name, data in files.items()}


def remove(folder: Path, name: str) -> None:
    """A file, or all that is sealed below a folder."""
    for each in sealed(folder, name):
        (folder / each).unlink(missing_ok=True)
        _seal_path(folder, each).unlink()


def sealed(folder: Path, name: str = "") -> list[str]:
    """Names of all that has a seal; of one file, or of what lies below one folder."""
    seals = folder / SEALS
    paths = [_seal_path(folder, name), *(seals / name).rglob("*.json")]
    names = (str(path.relative_to(seals)) for path in paths if path.is_file() and path.name[0] != ".")
    return sorted(name.removesuffix(".json") for name in names)


def sealed_as(folder: Path, name: str) -> tuple[int, int] | None:
    """Bytes and crc32c; None: it has no seal."""
    path = _seal_path(folder, name)
    return read_seal(path.read_bytes(), str(path)) if path.exists() else None


def read_seal(data: bytes, source: str) -> tuple[int, int]:
    try:
        told = json.loads(data)
        return int(told["bytes"]), int(told["crc32c"])
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(
            wrong=f"{source} cannot be read", found=str(error), mend="remove it if its file is sound"
        ) from None


def sound(folder: Path, name: str) -> Path:
    for each in sealed(folder, name):
        if damage := damage_of(folder, each):
            raise Corrupt(wrong=f"{folder / each} is not what was left there", found=", ".join(damage),
                          mend="copy it from where it is sound, or make it again")  # fmt: skip
    return folder / name


def damage_of(folder: Path, name: str) -> tuple[str, str] | None:
    """missing | torn | altered, and what was found; None: as it was left."""
    try:
        told = sealed_as(folder, name)
        if told is None:
            return None
        num_bytes, crc = measured(folder / name)
    except Corrupt as fault:
        return "altered", str(fault)
    except OSError as error:
        return "missing", error.strerror or "unreadable"
    if num_bytes != told[0]:
        return "torn", f"{num_bytes} bytes of {told[0]}"
    return None if crc == told[1] else ("altered", f"crc32c {crc:08x} for {told[1]:08x}")


def _seal(folder: Path, name: str) -> None:
    write_atomic(_seal_path(folder, name), _told(*measured(folder / name)))


def _told(num_bytes: int, crc: int) -> bytes:
    return json.dumps({"bytes": num_bytes, "crc32c": crc}).encode()


def _seal_path(folder: Path, name: str) -> Path:
    return folder / SEALS / f"{name}.json"
