"""The words that are asked: a prompt is cleaned once, by one rule, wherever it comes from.

The rule is the one that stock Wan applies when ftfy is there (mend mojibake, NFC, unescape HTML twice, fold white
space); it is part of the contract, because it decides what the teacher is asked.
"""

import html
import re

CLEANING = "ftfy 6, html.unescape twice, white space folded"


def clean_prompt(text: str) -> str:
    if text.isascii() and text.isprintable() and "&" not in text:  # nothing but spaces to mend: 25 times faster
        return " ".join(text.split())
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()
