"""How a slot is filled. No torch: reading processes import this.

filler = Filler(shards, Options(text_rows=77, on_corrupt="stop"))
slot.ask_for(samples.rows)
filled = finished(slot, [filler.fill(slot, progress, ALONE)])       or several fillers, see train/feed/pieces.py

rows -> looked up: noise levels, whose text -> each row's extent straight into its place, or decoded into it
-> distinct texts, once each -> a Piece
"""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from common.errors import Corrupt, Partial
from common.record import Array
from common.shards import ShardSet
from train.feed.pieces import Piece, Share
from train.feed.shelf import Facts, Place, Shelf, Shelved, TextName, Texts, item_of
from train.feed.slots import FINAL, UNFOUND, Slot, Spans, known, prompt_and_length

PATIENCE_S, LOOK_AGAIN_S = 0.05, 0.0002
"""For another filler that has not come to look up its rows, as long as it does not get on."""


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


class Layout(NamedTuple):
    """Which text lies where in a slot: a function of the samples that were found."""

    names: list[TextName]
    rows: list[int]
    inverse: list[int]
    """Whose text is whose, by those rows."""
    unfound: list[int]
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
        if share.number == 0 and filling.has_all_at_hand():
            layout = filling.read_texts()  # small things first: points sweep the caches
        filling.read_points()
        return filling.piece(layout or filling.read_texts())

    def find(self, stem: bytes, record: int, point: int) -> Found:
        shard = self.shelf.shard(stem)
        number = shard.point(record, point)
        return Found(shard, number, shard.place(number), shard.known(number))

    def text(self, name: TextName) -> Array:  # [L, D]
        return self.texts.get(name, self.shelf.shard(name[0]).reader)

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
        self._bad: dict[int, Corrupt] = {}

    def has_all_at_hand(self) -> bool:
        return all(self._is_at_hand(stem) for stem, _, _ in self._request)

    def read_points(self) -> None:
        slot, found = self._slot, self._found
        own, others = self._share.rows(len(self._request))
        left_behind = slot.points_taken.of(self._share.number)  # nobody else reads what a dead one had taken
        # First look-ups, then reads: a read sweeps the caches, a look-up between two would wait for memory.
        self._look_up(own)
        at_hand = (row for row in others if self._is_at_hand(self._request[row][0]))
        for row in dict.fromkeys([*own, *left_behind, *at_hand]):
            if not slot.points_taken.take(row, self._share.number):
                continue
            if row not in found:
                self._look_up((row,))
            if row in self._bad:
                continue
            self._progress[0] = row
            try:
                _read_point(slot, row, found[row])
                if slot.plan.spans:
                    _read_end(slot, row, found[row].shard, self._request[row])
            except (Corrupt, OSError) as error:
                self._bad[row] = self._filler.pardoned(error, self._request[row][0])

    def read_texts(self) -> Layout | None:
        """None: all of them are others' already."""
        slot, reader = self._slot, self._share.number
        if not slot.texts_taken.some_are_left(reader):
            return None
        layout = self._lay_out()
        slot.texts_taken.end_at(len(layout.names))
        slot.inverse[layout.rows] = layout.inverse
        area = slot.text(len(layout.names), layout.longest)
        for number in self._texts_to_read(layout):
            if slot.texts_taken.take(number, reader):
                text = self._text(layout, number)
                slot.lengths[number] = len(text)
                area[number, : len(text)] = text
                if len(text) < layout.longest:
                    area[number, len(text) :] = 0
        return layout

    def piece(self, layout: Layout | None) -> Piece:
        bad = [(row, fault.wrong, fault.found, fault.mend) for row, fault in self._bad.items()]
        if layout is None:
            return Piece(bad)
        return Piece(bad, layout.unfound, len(layout.names), layout.longest, layout.num_cut)

    def _look_up(self, rows: Iterable[int]) -> None:
        """Those that this one has not looked up yet. What others need to know of them goes into the slot."""
        slot, found, bad, new = self._slot, self._found, self._bad, []
        find, request, progress, told = self._filler.find, self._request, self._progress, slot.known
        for row in rows:
            if row not in found and row not in bad:
                progress[0] = row
                try:
                    sample = found[row] = find(*request[row])
                    *_, prompt, length = sample.facts
                    told[row] = known(prompt, length)
                    new.append(row)
                except (Corrupt, OSError) as error:
                    bad[row] = self._filler.pardoned(error, request[row][0])
                    told[row] = UNFOUND
        if new:
            facts = zip(*(found[row].facts for row in new), strict=True)
            slot.timesteps[new], slot.sigmas[new], slot.expert[new], *_ = facts

    def _lay_out(self) -> Layout:
        """From what all have found: who looks up a row too does it because another is not there yet."""
        slot, request = self._slot, self._request
        self._look_up(self._unknown_after_a_while())
        told = slot.known.tolist()
        rows = [row for row, said in enumerate(told) if said != UNFOUND]
        numbers: dict[tuple[bytes, int], int] = {}
        inverse = [numbers.setdefault((request[row][0], told[row]), len(numbers)) for row in rows]
        most, lengths = self._filler.texts.max_rows, [prompt_and_length(told[row])[1] for row in rows]
        return Layout(
            names=[(stem, prompt_and_length(said)[0]) for stem, said in numbers],
            rows=rows,
            inverse=inverse,
            unfound=[row for row, said in enumerate(told) if said == UNFOUND],
            longest=min(most, max(lengths, default=0)),
            num_cut=sum(length > most for length in lengths),
        )

    def _unknown_after_a_while(self) -> list[int]:
        """Rows that nobody has found. Others are at their own, and get time for what would take long here too."""
        until, before = 0.0, len(self._request) + 1
        while True:
            unknown = [row for row, said in enumerate(self._slot.known.tolist()) if said <= 0]
            far = [row for row in unknown if row not in self._bad and not self._is_at_hand(self._request[row][0])]
            if len(far) < before:
                until, before = time.monotonic() + PATIENCE_S, len(far)
            if not far or time.monotonic() > until:
                return unknown
            time.sleep(LOOK_AGAIN_S)

    def _texts_to_read(self, layout: Layout) -> Iterable[int]:
        """Its own rows', then what others may not have come to."""
        own = dict.fromkeys(whose for row, whose in zip(layout.rows, layout.inverse, strict=True) if row in self._found)
        others = [number for number, name in enumerate(layout.names) if self._is_at_hand(name[0])]
        left_behind = [number for number in self._slot.texts_taken.of(self._share.number) if number < len(layout.names)]
        return dict.fromkeys([*own, *left_behind, *others])

    def _is_at_hand(self, stem: bytes) -> bool:
        """Helping others is no help where a shard must be opened for it: they open it too."""
        return self._filler.shelf.holds(stem)

    def _text(self, layout: Layout, number: int) -> Array:
        """A damaged one is empty, and costs its samples."""
        name = layout.names[number]
        self._progress[0] = layout.rows[layout.inverse.index(number)]
        try:
            return self._filler.text(name)
        except (Corrupt, OSError) as error:
            fault = self._filler.pardoned(error, name[0])
        rows = [row for row, whose in zip(layout.rows, layout.inverse, strict=True) if whose == number]
        self._bad |= dict.fromkeys(rows, fault)
        return self._slot.text(1, 0)[0]


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
