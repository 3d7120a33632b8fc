"""Pictures of one's own in the place of the teacher's: `source: images`. Captions and files; no torch.

    wishes, summary = read_pictures(config.images)        a wish each: its caption, a seed out of its content, its name
    for name, found in pictures_of(config.images, seeds, height, width): ...      RGB of that size, or why there is none

    images.path   a folder          a/b.jpg, its caption in a/b.txt or in a/b.json {"caption": ...}; no hidden folders
                  pictures.jsonl    {"file": "a/b.jpg", "caption": ...} a line; files as seen from the manifest
                  pictures*.tar     WebDataset shards, read with that library: the same pairs, by key

A picture is resized until it covers the configured size, and cut at its centre; what is transparent lies on white, and
colours are what a viewer shows: in sRGB, by the picture's own colour profile where it has one.
Equal captions do not collide: the seed is a digest of the picture's bytes, so another picture is another record.
"""

import errno
import glob
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common.cleaning import clean_prompt
from common.errors import BadUsage, Fault
from harvest.config import ImagesConfig
from harvest.prompts import Wish
from harvest.seen import Seen
from harvest.stills import PICTURES, VIDEOS, Found, require_still, seed_of_picture, still

CAPTIONS, FILES = ("caption", "prompt", "text"), ("file", "file_name")
MANIFEST, SHARD = ".jsonl", ".tar"
GONE = (errno.ENOENT, errno.ENOTDIR)


def read_pictures(images: ImagesConfig, moved: Callable[[], object] = lambda: None) -> tuple[list[Wish], str]:
    """Every byte is read, once: a seed is a digest of its picture. `moved` hears of each file."""
    seen = Seen("pictures", {"path": str(images.path.absolute()), "frame": images.frame})
    wishes, bare, torn, links = [], list[str](), list[str](), list[str]()
    try:
        for name, caption, seed, *why in _told_of(images, seen, moved, links):
            prompt = clean_prompt(caption)
            wishes.append(Wish(prompt=prompt, seed=seed, picture=name))
            bare += [] if prompt else [name]
            torn += [name] if any(why) else []
    except BaseException:
        seen.keep_so_far()
        raise
    seen.keep()
    if not wishes:
        raise BadUsage(wrong=f"{images.path} holds no picture", found=f"none of {', '.join(PICTURES)}",
                       mend="set images.path to a folder, a .jsonl or .tar files")  # fmt: skip
    if bare:
        raise BadUsage(wrong=f"{len(bare)} of {len(wishes)} pictures have no caption", found=bare[0],
                       mend="write it beside the picture: NAME.txt, or NAME.json with a \"caption\"")  # fmt: skip
    told = f"{len(wishes)} pictures from {images.path}, resized to cover the size and cut at the centre"
    told += f"; {len(torn)} or more cannot be read: {torn[0]}" + " ..." * (len(torn) > 1) if torn else ""
    return wishes, told + (f"; folders behind links are not entered: {', '.join(links)}" if links else "")


def pictures_of(images: ImagesConfig, seeds: Mapping[str, int], height: int, width: int, *,
                by_profile: bool = True) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """(name, PIL image) of each that can be read, (name, str) that says why of each that cannot. `seeds`: by name, as
    they were planned; what is another picture by now is another record."""
    for name, data in _bytes_of(images.path, seeds):
        if isinstance(data, str):
            yield name, data
        elif seed_of_picture(data, images.frame) != seeds[name]:
            yield name, "it has changed since the plan"
        else:
            yield name, still(data, images.frame, height, width, by_profile=by_profile)


def _told_of(images: ImagesConfig, seen: Seen, moved: Callable[[], object], links: list[str]
             ) -> Iterator[list[Any]]:  # fmt: skip
    """Name, caption and seed of each, and why it cannot be read; what looks as it did is not read again."""

    def read(found: Iterable[Found]) -> list[list[Any]]:
        told: list[list[Any]] = []
        for each in found:
            why = require_still(each, images.frame)
            told.append([each.name, each.caption, seed_of_picture(each.data, images.frame), *filter(None, [why])])
            moved()
        return told

    for name, files, found in _found(images.path, moved, links):
        moved()
        yield from seen.of(name, files, partial(read, found))


def _found(path: Path, moved: Callable[[], object], links: list[str]
           ) -> Iterator[tuple[str, list[Path], Iterable[Found]]]:  # fmt: skip
    """In an order that depends on names alone: what holds pictures, its files, and they themselves when wanted."""
    if path.suffix == SHARD:
        yield from ((str(shard), [shard], _of_shard(shard)) for shard in _shards(path))
    elif path.suffix == MANIFEST:
        for name, caption in _manifest(path):
            yield f"{name}\n{caption}", [_there(path.parent / name)], _one(name, path.parent / name, caption)
    elif path.is_dir():
        for file in sorted(_files_below(path, moved, links)):
            name, beside = file.relative_to(path).as_posix(), _beside(file)
            yield name, [file, *beside], _one(name, file, *beside)
    else:
        raise BadUsage(wrong="images.path is nothing that is known", found=str(path),
                       mend="give a folder, a .jsonl manifest, a .tar or a pattern of .tar files")  # fmt: skip


def _files_below(path: Path, moved: Callable[[], object], links: list[str]) -> Iterator[Path]:
    """Pictures and films; nothing hidden, neither files nor folders (.thumbs/). Folders behind `links` are told."""

    def unlisted(error: OSError) -> None:
        _require_lasting(error, Path(error.filename))
        raise BadUsage(wrong="a folder of pictures cannot be listed", found=f"{error.filename}: {error.strerror}",
                       mend="make it readable, or leave it out of images.path")  # fmt: skip

    for folder, folders, files in os.walk(path, onerror=unlisted):
        moved()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += [str(Path(folder, name).relative_to(path)) for name in folders if Path(folder, name).is_symlink()]
        yield from (Path(folder, name) for name in files
                    if not name.startswith(".") and Path(name).suffix.lower() in (*PICTURES, *VIDEOS))  # fmt: skip


def _one(name: str, file: Path, caption: str | Path = "") -> Iterator[Found]:
    told = (
        caption if isinstance(caption, str) else _told(_read(caption), str(caption), is_json=caption.suffix == ".json")
    )
    yield Found(name=name, data=_read(file), caption=told)


def _bytes_of(path: Path, names: Collection[str]) -> Iterator[tuple[str, bytes | str]]:
    if path.suffix == SHARD:
        left = set(names)
        for shard in _shards(path):
            here = {name for name in left if name.startswith(f"{shard}/")}
            for found in _of_shard(shard) if here else ():
                if found.name in here:
                    here.remove(found.name)
                    left.remove(found.name)
                    yield found.name, found.data
                if not here:
                    break
        yield from ((name, "it is there no more") for name in sorted(left))
        return
    folder = path.parent if path.suffix == MANIFEST else path
    for name in names:
        try:
            data: bytes | str = (folder / name).read_bytes()
        except OSError as error:
            _require_lasting(error, folder / name)
            data = f"it cannot be read: {error.strerror}"
        yield name, data


def _require_lasting(error: Exception, path: Path) -> None:
    """A disk or a network that fails for a while says nothing of the picture: who asks again may get it."""
    if isinstance(error, OSError) and error.errno not in (None, *GONE):
        raise Fault(wrong="a picture cannot be read now", found=f"{path}: {error.strerror}",
                    mend="run the same command again") from error  # fmt: skip


def _shards(path: Path) -> list[Path]:
    shards = [Path(name) for name in sorted(glob.glob(str(path)))]
    if not shards:
        raise BadUsage(wrong="images.path names no file", found=str(path), mend="give .tar files that are there")
    return shards


def _of_shard(shard: Path) -> Iterator[Found]:
    import tarfile

    import webdataset

    def all_of_them(urls: Any) -> Any:  # under a launcher, too: the plan shares the work out, not the library
        return urls

    samples = webdataset.WebDataset([str(shard)], shardshuffle=False, empty_check=False, nodesplitter=all_of_them,
                                    workersplitter=all_of_them)  # fmt: skip
    try:
        for sample in samples:
            for kind in (*PICTURES, *VIDEOS):
                if kind[1:] in sample:
                    name = f"{shard}/{sample['__key__']}{kind}"
                    yield Found(name=name, data=sample[kind[1:]], caption=_caption_in(sample, name))
    except (OSError, ValueError, tarfile.TarError) as error:
        _require_lasting(error, shard)
        raise BadUsage(wrong="a shard of pictures cannot be read", found=f"{shard}: {error}",
                       mend="copy it again, or leave it out of images.path") from None  # fmt: skip


def _caption_in(sample: dict[str, Any], name: str) -> str:
    if "txt" in sample:
        return _told(sample["txt"], name, is_json=False)
    return _told(sample["json"], name, is_json=True) if "json" in sample else ""


def _beside(file: Path) -> list[Path]:
    """Where its caption stands: one file, or none."""
    return [beside for suffix in (".txt", ".json") if (beside := file.with_suffix(suffix)).exists()][:1]


def _told(data: bytes, name: str, *, is_json: bool) -> str:
    try:
        values = json.loads(data) if is_json else data.decode("utf-8-sig")
    except ValueError as error:
        raise BadUsage(wrong=f"the caption of {name} cannot be read", found=str(error), mend="save it as UTF-8 text, "
                       "or as JSON with a \"caption\"") from None  # fmt: skip
    return values if isinstance(values, str) else str(_named(values, CAPTIONS) or "")


def _manifest(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise BadUsage(wrong=f"{path} line {number} is not JSON", found=str(error), mend="mend it") from None
        name = _named(values, FILES)
        if not isinstance(name, str) or not name:
            raise BadUsage(wrong=f"{path} line {number} names no file", found=repr(values)[:80],
                           mend='write {"file": "a.jpg", "caption": "..."}')  # fmt: skip
        yield name, str(_named(values, CAPTIONS) or "")


def _named(values: Any, names: Collection[str]) -> Any:
    """The first of these keys that a JSON object has."""
    return next((values[name] for name in names if isinstance(values, dict) and name in values), None)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadUsage(wrong="images.path names what cannot be read", found=f"{path}: {error.strerror}",
                       mend="put it there, or leave it out") from None  # fmt: skip


def _there(path: Path) -> Path:
    if not path.is_file():
        raise BadUsage(
            wrong="images.path names what is not there", found=str(path), mend="put it there, or leave it out"
        )
    return path
