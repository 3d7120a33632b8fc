"""What was set aside: records that must not enter a shard, with what is wrong and where.

    Note(item=..., walked=keys, shard=..., faults=faults).write(set_dir)
    for note in notes_that_count(set_dir, manifest): note.faults ...

quarantine/<item>.json: {"walked": [key], "shard": item or null, "faults": [{key, what, where, step}]}

A note is written before the good records of the same walk are committed, as `shard`, and counts once they are: killed
in between, all are walked again together. Mended records leave its faults, the note stays: a record is a function of
its micro-batch, and who asks for one again must know what was walked with it.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from common.errors import Corrupt, Refused
from common.files import write_atomic
from common.manifest import Manifest
from common.record import item_id
from common.shards import MOVED, QUARANTINE

Fault = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    item: str
    """What was walked, and the name of the file."""
    walked: list[str]
    """Keys, in their order."""
    shard: str | None
    """The item under which the good ones are committed."""
    faults: list[Fault]

    @property
    def bad_keys(self) -> set[str]:
        return {fault["key"] for fault in self.faults}

    def write(self, set_dir: Path) -> None:
        write_atomic(set_dir / QUARANTINE / f"{self.item}.json", self.to_json())

    def to_json(self) -> bytes:
        values = asdict(self)
        del values["item"]
        return json.dumps(values, indent=1).encode()

    @classmethod
    def from_json(cls, item: str, data: bytes) -> Self:
        """A note names what was walked by its own name."""
        try:
            note = cls(item=item, **json.loads(data))
            if item_id(note.walked) != item or not note.bad_keys <= set(note.walked):
                raise ValueError("the keys in it are others than those that it was written for")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Corrupt(wrong=f"note {QUARANTINE}/{item}.json is damaged", found=str(error),
                          mend="copy it again; or remove it: what it set aside is asked again") from None  # fmt: skip
        return note


def notes_of(set_dir: Path) -> list[Note]:
    return [read_note(path) for path in sorted((set_dir / QUARANTINE).glob("[!.]*.json"))]


def notes_that_count(set_dir: Path, manifest: Manifest) -> list[Note]:
    moved = {path.stem for path in (set_dir / MOVED).glob("[!.]*.json")}
    return [note for note in notes_of(set_dir) if note.shard is None or note.shard in manifest.by_item.keys() | moved]


def note_of(set_dir: Path, item: str) -> Note | None:
    try:
        return read_note(set_dir / QUARANTINE / f"{item}.json")
    except FileNotFoundError:
        return None


def read_note(path: Path) -> Note:
    return Note.from_json(path.stem, path.read_bytes())


def joined(note: Note, other: Note) -> Note:
    """What two places say of one walk: what was mended in either of them is mended."""
    if note.shard != other.shard:
        raise Refused(wrong=f"item {note.item} was walked twice, and other records were set aside",
                      found=f"the good ones are shard {note.shard} there, {other.shard} here",
                      mend="carry into another folder")  # fmt: skip
    return replace(note, faults=[fault for fault in note.faults if fault["key"] in other.bad_keys])


def remove_note(set_dir: Path, item: str) -> None:
    (set_dir / QUARANTINE / f"{item}.json").unlink(missing_ok=True)
