"""What a user's mistake, a damaged file or a wish to stop looks like: one line, three parts, one exit code.

    raise Refused(wrong="the set was made by another teacher", found="boundary 0.9, the set has 0.875",
                  mend="harvest into a new folder")

The command lines (common/cli.py) print such a fault as one line and leave with its exit code; a traceback is
kept for our own mistakes.
"""

from functools import partial
from typing import Any


class Fault(Exception):
    """Something that a user can cause: what is wrong, what was found, what to do."""

    exit_code = 1

    def __init__(self, *, wrong: str, found: str, mend: str) -> None:
        super().__init__(wrong, found, mend)
        self.wrong, self.found, self.mend = wrong, found, mend

    def __reduce__(self) -> tuple[Any, ...]:
        """From a process to another."""
        return partial(type(self), wrong=self.wrong, found=self.found, mend=self.mend), ()

    def __str__(self) -> str:
        return f"{self.wrong}; found: {self.found}; do: {self.mend}"


class BadUsage(Fault):
    """A configuration, a command line or an input file that cannot be used."""

    exit_code = 2


class Partial(Fault):
    """The work ended with records missing: quarantined, unreadable, or no space left."""

    exit_code = 3


class Refused(Fault):
    """It could be done, and would be wrong: another contract, another owner, an unsafe file."""

    exit_code = 4


class Corrupt(Fault):
    """Bytes that are not the ones that were written."""

    exit_code = 5


class Stopped(Fault):
    """Stopped on request with everything whole committed: run the same command again."""

    exit_code = 75
