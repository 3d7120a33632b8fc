"""A slot that several fillers fill together: who does what, and how what each has to say becomes one. No torch.

    filled = finished(slot, [filler.fill(slot, progress, Share(number, 3)) for number in range(3)])

They share no lock. Each looks up its own rows and reads them, then those of others whose shards it has open, but only
what nobody has taken yet (Marks in train/feed/slots.py): who is held up leaves more to the others. Two that take the
same thing at once write the same bytes. Nobody concludes from a mark that bytes are there: all have answered then.

`on_corrupt: skip` puts the next good sample of the same micro-batch (the first, after the last) in the place of a
damaged one: the shape stays, nothing is weighted apart, and the result is a function of the micro-batch alone. A
micro-batch without one good sample stops all the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

from common.errors import Corrupt
from train.feed.slots import Slot

BadRow = tuple[int, str, str, str]
"""Its number, and the three parts of the fault."""


class Share(NamedTuple):
    """Which of a slot's fillers it is."""

    number: int
    num_fillers: int

    def rows(self, num_samples: int) -> tuple[list[int], list[int]]:
        """Its own, which together with all others' own are all; and the others', from its own on."""
        begin, count = self.number * num_samples // self.num_fillers, -(-num_samples // self.num_fillers)
        rows = [*range(begin, num_samples), *range(begin)]
        return rows[:count], rows[count:]


ALONE = Share(0, 1)


class Piece(NamedTuple):
    """What one filler has to say of a slot. Plain values: it travels as JSON."""

    bad: list[BadRow]
    unfound: list[int] | None = None
    """Rows without a text, when it laid out the texts. None: it had no need to."""
    num_texts: int = 0
    longest: int = 0
    num_cut: int = 0


class Filled(NamedTuple):
    """What a filled slot holds beyond its fixed shapes."""

    num_texts: int
    longest: int
    num_cut: int
    """Samples whose text was cut."""
    skipped: list[tuple[int, str]]
    """Row, and what was found instead of the sample that stood there."""


def finished(slot: Slot, pieces: Sequence[Piece]) -> Filled:
    """The next good row takes the place of each bad one."""
    first, *others = [piece for piece in pieces if piece.unfound is not None]
    told = []
    if any(piece.bad for piece in pieces):
        bad = {row: parts for piece in pieces for row, *parts in piece.bad}
        good = [row for row in range(slot.plan.num_samples) if row not in bad]
        # Unlike: a shard went bad between the looks of two, and their texts lie differently.
        if not good or any(piece.unfound != first.unfound for piece in others):
            wrong, found, mend = bad[min(bad)]
            raise Corrupt(wrong=wrong, found=found, mend=mend)
        for row in bad:
            slot.copy_row(next((later for later in good if later > row), good[0]), row)
        told = [(row, f"{wrong}; found: {found}") for row, (wrong, found, _) in sorted(bad.items())]
    return Filled(first.num_texts, first.longest, first.num_cut, told)
