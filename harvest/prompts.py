"""Prompts from a file, cleaned once, in file order.

    wishes, report = read_prompts(Path("configs/prompts/shapes.txt"))

    .txt      one prompt a line; a line that begins with "# " is a remark
    .jsonl    {"prompt": ..., "seed": 1, "width": 512, "height": 512} a line (or .ndjson); all but the prompt may be
              absent or null
    .csv      the same columns, with a header; a prompt that holds a comma stands in quotes
    .parquet  the same columns (needs pyarrow)

Prompts are cleaned once, by the contract's rule (common/cleaning.py). A row that cannot be understood is refused with
its line; empty prompts, duplicates and columns that nobody reads are told in the report.
"""

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cleaning import clean_prompt
from common.errors import BadUsage

REMARK = "# "
COLUMNS = ("prompt", "seed", "width", "height")
ELSEWHERE = {"negative_prompt": "it is one for the whole set: negative_prompt in the configuration"}
"""Columns that would be a setting, were they read."""
MOVED_EVERY = 1000
EXACT_BELOW = 2**53
"""A whole number in a floating point column (tables make one of a column with gaps) is itself up to here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A prompt as a file asks for it; None: as the configuration says."""

    prompt: str
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    picture: str = ""
    """Its name, where the record begins from one."""


def read_prompts(
    path: Path, *, limit: int | None = None, moved: Callable[[], object] = lambda: None
) -> tuple[list[Wish], str]:
    """Distinct wishes in order of first appearance, and one line about what was merged and left out."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BadUsage(wrong=f"{path}: prompts cannot be read from such a file", found=f"suffix {path.suffix}",
                       mend=f"give one of {', '.join(filter(None, _READERS))}")  # fmt: skip
    raw, unread, num_empty = [], dict[str, None](), 0
    for count, (where, values) in enumerate(reader(path)):
        if count % MOVED_EVERY == 0:
            moved()
        wish = _wish(values, where, path, unread)
        if wish.prompt:
            raw.append(wish)
        else:
            num_empty += 1
    wishes = list(dict.fromkeys(raw))
    if not wishes:
        raise BadUsage(wrong=f"{path} holds no prompt", found="no line with text", mend="write one prompt a line")
    told = [f"{len(wishes[:limit])} prompts from {path}"]
    told += [f"{len(raw) - len(wishes)} duplicates merged"] if len(raw) > len(wishes) else []
    told += [f"{num_empty} empty ones left out"] if num_empty else []
    told += [f"not read: {', '.join(map(_with_nearest, unread))}"] if unread else []
    return wishes[:limit], ", ".join(told)


def seed_of(prompt: str, number: int) -> int:
    """The number-th seed of a prompt: its own, so that no two prompts share their noise."""
    return int.from_bytes(hashlib.sha256(f"{prompt}\n{number}".encode()).digest()[:8], "little") >> 1


Row = tuple[str, Any]
"""Where it stands in the file, and what it says."""


def _lines(path: Path) -> Iterator[Row]:
    for line in _text(path).split("\n"):
        if line.strip() and not line.startswith(REMARK):
            yield "", {"prompt": line}


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                values = json.loads(line)
            except ValueError as error:
                raise BadUsage(wrong=f"{path} line {number} is not JSON", found=str(error), mend="mend it") from None
            yield f"line {number}", values


def _csv(path: Path) -> Iterator[Row]:
    """Strictly: a quote that is never closed would swallow what follows it."""
    rows = csv.reader(io.StringIO(_text(path), newline=""), strict=True, skipinitialspace=True)
    try:
        names = [name.strip() for name in next(rows, [])]
        for cells in rows:
            where = f"line {rows.line_num}"
            if len(cells) > len(names):
                raise BadUsage(
                    wrong=f"{path} {where} has {len(cells)} cells for {len(names)} columns",
                    found=", ".join(cells)[:80],
                    mend="a prompt that holds a comma: put quotes round it",
                )
            if cells:
                given = zip(names, cells, strict=False)
                yield where, {name: cell for name, cell in given if cell.strip() or name == COLUMNS[0]}
    except csv.Error as error:
        raise BadUsage(wrong=f"{path} line {rows.line_num} is not CSV", found=str(error),
                       mend='close each quote; one inside of a quoted cell is written twice: "a ""big"" cat"'
                       ) from None  # fmt: skip


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise BadUsage(wrong=f"{path} cannot be read", found="no pyarrow", mend="pip install pyarrow") from None
    try:
        names = parquet.read_schema(path).names
        known = [name for name in names if name in COLUMNS]
        others = dict.fromkeys(name for name in names if name not in COLUMNS)
        rows = parquet.read_table(path, columns=known).to_pylist()
    except (OSError, ValueError) as error:
        raise BadUsage(
            wrong=f"{path} cannot be read", found=str(error).split("\n")[0], mend="set prompts.file"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", others | row


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _lines, "": _lines, ".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".parquet": _parquet
}  # fmt: skip


def _wish(values: Any, where: str, path: Path, unread: dict[str, None]) -> Wish:
    if isinstance(values, dict) and not values.keys() <= set(COLUMNS):
        unread |= dict.fromkeys(_harmless((name for name in values if name not in COLUMNS), where, path))
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise BadUsage(wrong=f"{path} {where} has no prompt", found=repr(values)[:80],
                       mend="give it a column `prompt`")  # fmt: skip
    try:
        numbers: dict[str, Any] = {name: _whole(values[name]) for name in COLUMNS[1:] if values.get(name) is not None}
        if not 0 <= numbers.get("seed", 0) < 2**63:
            raise ValueError("a seed beyond 64 bits")
        if min(numbers.get("width", 1), numbers.get("height", 1)) < 1:
            raise ValueError("a picture without pixels")
    except (TypeError, ValueError):
        raise BadUsage(wrong=f"{path} {where}: seed, width and height are whole numbers, sizes from 1 on",
                       found=repr(values)[:80], mend="correct it") from None  # fmt: skip
    return Wish(prompt=clean_prompt(values["prompt"]), **numbers)


def _whole(value: Any) -> int:
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT_BELOW:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"{value!r} is no whole number")
    return int(value)


def _harmless(names: Iterable[str], where: str, path: Path) -> Iterator[str]:
    """Columns of other uses may stand there; one that is meant for us, and would not be heard, is refused."""
    for name in names:
        plain = name.strip().lower()
        if plain in COLUMNS:
            raise BadUsage(wrong=f"{path} {where}: unknown column {name!r}", found=", ".join(COLUMNS) + " are known",
                           mend=f"call it {plain}")  # fmt: skip
        if plain in ELSEWHERE:
            raise BadUsage(wrong=f"{path} {where}: {plain} of a single prompt", found=repr(name),
                           mend=f"leave it out; {ELSEWHERE[plain]}")  # fmt: skip
        if plain:  # a table's index has no name
            yield name


def _with_nearest(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0.75)
    return f"{name} (did you mean {near[0]}?)" if near else name


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadUsage(
            wrong="the prompt file cannot be read", found=f"{path}: {error.strerror}", mend="set prompts.file"
        ) from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        found = f"byte 0x{error.object[error.start]:02x} in line {line}"
        raise BadUsage(wrong=f"{path} is not UTF-8", found=found, mend="save it as UTF-8") from None
