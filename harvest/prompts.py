"""Prompts from a file, cleaned once, in file order.

    wishes, report = read_prompts(Path("configs/prompts/shapes.txt"))

    .txt      one prompt a line; a line that begins with "# " is a remark
    .jsonl    {"prompt": ..., "seed": 1, "width": 512, "height": 512} a line; all but the prompt may be absent
    .csv      the same columns, with a header
    .parquet  the same columns (needs pyarrow)

Prompts are cleaned once, by the contract's rule (common/cleaning.py).
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cleaning import clean_prompt
from common.errors import BadUsage

REMARK = "# "
COLUMNS = ("prompt", "seed", "width", "height")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A prompt as a file asks for it; None: as the configuration says."""

    prompt: str
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    picture: str = ""
    """Its name, where the record begins from one."""


def read_prompts(path: Path, *, limit: int | None = None) -> tuple[list[Wish], str]:
    """Distinct wishes in order of first appearance, and one line about what was merged."""
    raw = [wish for wish in _READERS.get(path.suffix, _lines)(path) if wish.prompt]
    wishes = list(dict.fromkeys(raw))[:limit]
    if not wishes:
        raise BadUsage(wrong=f"{path} holds no prompt", found="no line with text", mend="write one prompt a line")
    num_merged = len(raw) - len(set(raw))
    return wishes, f"{len(wishes)} prompts from {path}" + (f", {num_merged} duplicates merged" if num_merged else "")


def seed_of(prompt: str, number: int) -> int:
    """The number-th seed of a prompt: its own, so that no two prompts share their noise."""
    return int.from_bytes(hashlib.sha256(f"{prompt}\n{number}".encode()).digest()[:8], "little") >> 1


def _lines(path: Path) -> Iterator[Wish]:
    for line in _text(path).split("\n"):
        if not line.startswith(REMARK):
            yield Wish(prompt=clean_prompt(line))


def _jsonl(path: Path) -> Iterator[Wish]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                values = json.loads(line)
            except ValueError as error:
                raise BadUsage(wrong=f"{path} line {number} is not JSON", found=str(error), mend="mend it") from None
            yield _wish(values, f"{path} line {number}")


def _csv(path: Path) -> Iterator[Wish]:
    for number, row in enumerate(csv.DictReader(io.StringIO(_text(path), newline="")), start=2):
        yield _wish({name: value for name, value in row.items() if value not in (None, "")}, f"{path} line {number}")


def _parquet(path: Path) -> Iterator[Wish]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise BadUsage(wrong=f"{path} cannot be read", found="no pyarrow", mend="pip install pyarrow") from None
    names = [name for name in parquet.read_schema(path).names if name in COLUMNS]
    for number, row in enumerate(parquet.read_table(path, columns=names).to_pylist(), start=1):
        yield _wish({name: value for name, value in row.items() if value is not None}, f"{path} row {number}")


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def _wish(values: Any, where: str) -> Wish:
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise BadUsage(wrong=f"{where} has no prompt", found=repr(values)[:80], mend="give it a column `prompt`")
    try:
        numbers: dict[str, Any] = {name: int(values[name]) for name in COLUMNS[1:] if name in values}
        if not 0 <= numbers.get("seed", 0) < 2**63:
            raise ValueError("a seed beyond 64 bits")
    except (TypeError, ValueError):
        raise BadUsage(wrong=f"{where}: seed, width and height are whole numbers", found=repr(values)[:80],
                       mend="correct it") from None  # fmt: skip
    return Wish(prompt=clean_prompt(values["prompt"]), **numbers)


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
