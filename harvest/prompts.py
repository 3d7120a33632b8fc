"""Prompts from a file, cleaned once, in file order.

    prompts = read_prompts(Path("configs/prompts/shapes.txt"))        one a line

The cleaning is the one that stock Wan applies when ftfy is there (mend mojibake, unescape HTML twice, fold white
space); it is part of the contract, because it decides what the teacher is asked.
"""

import hashlib
import html
import re
from pathlib import Path

from common.errors import BadUsage

CLEANING = "ftfy 6, html.unescape twice, white space folded"


def clean_prompt(text: str) -> str:
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def read_prompts(path: Path, *, limit: int | None = None) -> list[str]:
    """Distinct cleaned prompts in order of first appearance."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadUsage(
            wrong="the prompt file cannot be read", found=f"{path}: {error.strerror}", mend="set prompts.file"
        ) from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise BadUsage(
            wrong=f"{path} is not UTF-8",
            found=f"byte 0x{error.object[error.start]:02x} in line {line}",
            mend="save it as UTF-8",
        ) from None
    prompts = list(dict.fromkeys(filter(None, map(clean_prompt, text.splitlines()))))[:limit]
    if not prompts:
        raise BadUsage(wrong=f"{path} holds no prompt", found="no line with text", mend="write one prompt a line")
    return prompts


def seed_of(prompt: str, number: int) -> int:
    """The number-th seed of a prompt: its own, so that no two prompts share their noise."""
    return int.from_bytes(hashlib.sha256(f"{prompt}\n{number}".encode()).digest()[:8], "little") >> 1
