"""How a slot is filled. No torch: reading processes import this.

filler = Filler(shards, Options(text_rows=77, on_corrupt="stop"))
slot.ask_for(samples.rows)
filled = finished(slot, [filler.fill(slot, progress, ALONE)])       or several fillers, see train/feed/pieces.py

rows -> looked up -> noise levels, distinct texts once each, each row's extent straight into its place or decoded
into it -> a Piece
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from common.errors import Corrupt, Partial
from common.record import Array
from common.shards import ShardSet
from train.feed.pieces import BadRow, Piece, Share
from train.feed.shelf import Facts, Place, Shelf, Shelved, TextName, Texts, item_of
from train.feed.slots import FINAL, Slot, Spans


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What every reader of a run is told."""

    text_rows: int
    on_corrupt: str
    library: bool = False
    """Shards through zarr-python and tarfile, not by offset."""
    spans: Spans | None = None
    """With each point the state at its segment's end, see train/objective.py."""


class Found(NamedTuple):
    """Where a sample is, and what is known of it."""

    shard: Shelved
    number: int
    """Of its point in the shard."""
    place: Place | None
    facts: Facts
    """Timestep, sigma, expert, number of its prompt, tokens of that."""
    name: TextName


class Layout(NamedTuple):
    """Which text lies where in a slot: a function of the samples that were found."""

    rows: list[int]
    inverse: list[int]
    """Whose text is whose, by those rows."""
    texts: list[Found]
    """Of each text its first sample."""
    longest: int
    num_cut: int
    """Samples whose text was cut."""


class Filler:
    """One reader of micro-batches: a thread's, or a process's."""

    def __init__(self, shards: ShardSet, options: Options) -> None:
        self.shelf, self.texts = Shelf(shards, by_segments=bool(options.spans)), Texts(options.text_rows)
        self._skips = options.on_corrupt == "skip"

    def fill(self, slot: Slot, progress: Array, share: Share) -> Piece:
        """`progress[0]` says which row is being worked on, to whoever waits."""
        filling, layout = _Filling(self, slot, progress, share), None
        if share.number == 0:
            layout = filling.lay_out()
            filling.write_columns(layout)
            filling.read_texts(layout)
        filling.read_points()
        if layout is None and slot.texts_taken.some_are_left(share.number):
            layout = filling.lay_out()
            filling.read_texts(layout)
        return filling.piece(layout)

    def find(self, stem: bytes, record: int, point: int) -> Found:
        shard = self.shelf.shard(stem)
        number = shard.point(record, point)
        facts = shard.known(number)
        return Found(shard, number, shard.place(number), facts, (stem, facts[3]))

    def pardoned(self, error: Corrupt | OSError, stem: bytes) -> Corrupt:
        """Damage, where it may be skipped; anything else is raised."""
        if isinstance(error, OSError):
            raise Partial(
                wrong=f"item {item_of(stem.decode())} cannot be read",
                found=f"{error.filename or stem.decode()}: {error.strerror}",
                mend="look at the disk that holds the set, then run again",
            ) from None
        if not self._skips:
            raise error
        return error


class _Filling:
    """One filler at one slot."""

    def __init__(self, filler: Filler, slot: Slot, progress: Array, share: Share) -> None:
        self._filler, self._slot, self._progress, self._share = filler, slot, progress, share
        self._request: list[tuple[bytes, int, int]] = slot.request.tolist()
        self._found: dict[int, Found] = {}
        self._unfound: dict[int, Corrupt] = {}
        self._unread: dict[int, Corrupt] = {}

    def lay_out(self) -> Layout:
        every = range(len(self._request))
        self._look_up(every)
        samples = [(row, self._found[row]) for row in every if row in self._found]
        numbers: dict[TextName, int] = {}
        inverse = [numbers.setdefault(sample.name, len(numbers)) for _, sample in samples]
        texts = {sample.name: sample for _, sample in reversed(samples)}
        most, lengths = self._filler.texts.max_rows, [sample.facts[4] for _, sample in samples]
        return Layout(
            rows=[row for row, _ in samples],
            inverse=inverse,
            texts=[texts[name] for name in numbers],
            longest=min(most, max(lengths, default=0)),
            num_cut=sum(length > most for length in lengths),
        )

    def write_columns(self, layout: Layout) -> None:
        """Noise levels, and whose text is whose."""
        slot, rows = self._slot, layout.rows
        slot.texts_taken.end_at(len(layout.texts))
        if rows:
            slot.inverse[rows] = layout.inverse
            facts = zip(*(self._found[row].facts for row in rows), strict=True)
            slot.timesteps[rows], slot.sigmas[rows], slot.expert[rows], *_ = facts

    def read_texts(self, layout: Layout) -> None:
        slot, area = self._slot, self._slot.text(len(layout.texts), layout.longest)
        for number, sample in enumerate(layout.texts):
            if not slot.texts_taken.take(number, self._share.number):
                continue
            self._progress[0] = layout.rows[layout.inverse.index(number)]
            try:
                text = self._filler.texts.get(sample.name, sample.shard.reader)
            except (Corrupt, OSError) as error:
                rows = [row for row, whose in zip(layout.rows, layout.inverse, strict=True) if whose == number]
                self._unread |= dict.fromkeys(rows, self._filler.pardoned(error, sample.name[0]))
                continue
            slot.lengths[number] = len(text)
            area[number, : len(text)] = text
            if len(text) < layout.longest:
                area[number, len(text) :] = 0

    def read_points(self) -> None:
        slot, found, rows = self._slot, self._found, self._share.rows(len(self._request))
        # First all look-ups, then all reads: a read sweeps the caches, a look-up between two would wait for memory.
        self._look_up(rows[: len(rows) // self._share.num_fillers])
        for row in rows:
            if not slot.points_taken.take(row, self._share.number):
                continue
            if row not in found:
                self._look_up((row,))
            if row in self._unfound:
                continue
            self._progress[0] = row
            try:
                _read_point(slot, row, found[row])
                if slot.plan.spans:
                    _read_end(slot, row, found[row].shard, self._request[row])
            except (Corrupt, OSError) as error:
                self._unread[row] = self._filler.pardoned(error, self._request[row][0])

    def piece(self, layout: Layout | None) -> Piece:
        if layout is None:
            return Piece(_told(self._unread | self._unfound))
        laid_out = len(layout.texts), layout.longest, layout.num_cut
        return Piece(_told(self._unread), _told(self._unfound), *laid_out)

    def _look_up(self, rows: Iterable[int]) -> None:
        found, unfound, request, find = self._found, self._unfound, self._request, self._filler.find
        for row in rows:
            if row not in found and row not in unfound:
                self._progress[0] = row
                try:
                    found[row] = find(*request[row])
                except (Corrupt, OSError) as error:
                    unfound[row] = self._filler.pardoned(error, request[row][0])


def _told(bad: Mapping[int, Corrupt]) -> list[BadRow]:
    return [(row, fault.wrong, fault.found, fault.mend) for row, fault in bad.items()]


def _read_point(slot: Slot, row: int, sample: Found) -> None:
    if slot.buffers and sample.place:
        buffers, (fd, offset) = slot.buffers[row], sample.place
        if os.preadv(fd, buffers, offset) == len(buffers[0]):
            return
    slot.read_point(row, sample.shard.read, sample.number)  # to be checked or decoded, or cut short: that is said there


def _read_end(slot: Slot, row: int, shard: Shelved, sample: tuple[bytes, int, int]) -> None:
    """The state where the row's segment ends."""
    _, record, point = sample
    number = dict(slot.plan.spans or ())[point]
    if number == FINAL:
        slot.ends["end"][row] = shard.reader.read_final(record)
        slot.ends["end_sigmas"][row] = slot.ends["end_timesteps"][row] = 0.0
        return
    index = shard.point(record, number)
    slot.read_end(row, shard.read, index)
    slot.ends["end_timesteps"][row], slot.ends["end_sigmas"][row] = shard.known(index)[:2]
