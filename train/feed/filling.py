"""How a slot is filled. No torch: reading processes import this.

    filler = Filler(shards, Options(text_rows=77, on_corrupt="stop"))
    slot.request[:] = samples.rows
    filled = filler.fill(slot, progress)

    rows -> looked up -> each one's extent straight into its row, or decoded into it -> distinct texts, once each

`on_corrupt: skip` puts the next good sample of the same micro-batch (the first, after the last) in the place of a
damaged one: the shape stays, nothing is weighted apart, and the result is a function of the micro-batch alone. A
micro-batch without one good sample stops all the same.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from common.errors import Corrupt, Partial
from common.record import Array
from common.shards import ShardSet
from train.feed.shelf import Place, Shelf, Shelved, Text, TextName, Texts, item_of
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


class Filled(NamedTuple):
    """What a filled slot holds beyond its fixed shapes."""

    num_texts: int
    longest: int
    num_cut: int
    """Samples whose text was cut."""
    skipped: list[tuple[int, str]]
    """Row, and what was found instead of the sample that stood there."""


class Found(NamedTuple):
    """Where a sample is, and what is known of it."""

    shard: Shelved
    number: int
    """Of its point in the shard."""
    place: Place | None
    facts: tuple[float, float, int, int]
    """Timestep, sigma, expert, number of its prompt: as in FACTS."""
    name: TextName
    text: Text


class Filler:
    """One reader of micro-batches: a thread's, or a process's."""

    def __init__(self, shards: ShardSet, options: Options) -> None:
        self._shelf, self._texts = Shelf(shards, by_segments=bool(options.spans)), Texts(options.text_rows)
        self._skips = options.on_corrupt == "skip"

    def fill(self, slot: Slot, progress: Array) -> Filled:
        """`progress[0]` says which row is being worked on, to whoever waits."""
        found: dict[int, Found] = {}
        bad: dict[int, Corrupt] = {}
        request = slot.request.tolist()
        # First all look-ups, then all reads: a read sweeps the caches, a look-up between two would wait for memory.
        for row, sample in enumerate(request):
            progress[0] = row
            try:
                found[row] = self._find(*sample)
            except (Corrupt, OSError) as error:
                bad[row] = self._pardoned(error, sample[0])
        for row, sample in list(found.items()):
            progress[0] = row
            try:
                _read_point(slot, row, sample)
                if slot.plan.spans:
                    _read_end(slot, row, sample.shard, request[row])
            except (Corrupt, OSError) as error:
                bad[row] = self._pardoned(error, request[row][0])
                del found[row]
        if not found:
            raise bad[0]
        texts, num_cut = _write_columns(slot, found)
        _replace(slot, bad)
        longest = slot.write_texts(texts)
        told = [(row, f"{fault.wrong}; found: {fault.found}") for row, fault in sorted(bad.items())]
        return Filled(len(texts), longest, num_cut, told)

    def _find(self, stem: bytes, record: int, point: int) -> Found:
        shard = self._shelf.shard(stem)
        number = shard.point(record, point)
        facts = shard.facts.item(number)
        name = (stem, facts[-1])
        return Found(shard, number, shard.place(number), facts, name, self._texts.get(name, shard.reader))

    def _pardoned(self, error: Corrupt | OSError, stem: bytes) -> Corrupt:
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
    slot.ends["end_timesteps"][row], slot.ends["end_sigmas"][row] = shard.facts.item(index)[:2]


def _write_columns(slot: Slot, found: Mapping[int, Found]) -> tuple[list[Array], int]:
    """Noise levels and whose text is whose; the distinct texts, and how many samples have one that was cut."""
    rows, samples = list(found), found.values()
    facts = zip(*(sample.facts for sample in samples), strict=True)
    slot.timesteps[rows], slot.sigmas[rows], slot.expert[rows], _ = facts
    texts = {sample.name: sample.text for sample in samples}
    numbers = {name: number for number, name in enumerate(texts)}
    slot.inverse[rows] = [numbers[sample.name] for sample in samples]
    return [text.rows for text in texts.values()], sum(sample.text.is_cut for sample in samples)


def _replace(slot: Slot, bad: Mapping[int, Corrupt]) -> None:
    """The next good row takes the place of each bad one."""
    good = [row for row in range(slot.plan.num_samples) if row not in bad]
    for row in bad:
        slot.copy_row(next((later for later in good if later > row), good[0]), row)
