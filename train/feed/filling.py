"""How a slot is filled. No torch: reading processes import this.

    filled = Filler(shards, text_rows=77, on_corrupt="stop").fill(slot, samples, progress)

    samples -> looked up -> each one's extent straight into its row, or decoded into it -> distinct texts, once each

`on_corrupt: skip` puts the next good sample of the same micro-batch (the first, after the last) in the place of a
damaged one: the shape stays, nothing is weighted apart, and the result is a function of the micro-batch alone. A
micro-batch without one good sample stops all the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from common.errors import Corrupt, Partial
from common.manifest import Receipt
from common.record import Array, Contract
from common.schedule import pinned_points
from common.shard_reader import LibraryReader, OffsetReader, ShardReader
from common.shards import ShardSet
from train.feed.order import Sample
from train.feed.slots import FINAL, Slot

MAX_OPEN_SHARDS, MAX_WHOLE_SHARDS = 256, 4
"""Whole: what the format's library reads is held in memory, all of it."""
MAX_TEXT_BYTES = 64 << 20
"""Of texts that are kept for the next micro-batch that needs them."""
TextName = tuple[str, int]
"""Stem of the shard, number of the prompt in it."""


class Filled(NamedTuple):
    """What a filled slot holds beyond its fixed shapes."""

    num_texts: int
    longest: int
    num_cut: int
    """Samples whose text was cut."""
    skipped: list[tuple[int, str]]
    """Row, and what was found instead of the sample that stood there."""


class Shelved(NamedTuple):
    """An opened shard, flat: what a sample wants of it, by record * num_points + point."""

    reader: ShardReader
    stem: str
    num_points: int
    read: Callable[[int, memoryview], None]
    """The stored bytes of a point into a buffer."""
    timesteps: Array  # [R * K]
    sigmas: Array  # [R * K]
    expert: Array  # [R * K]
    pinned: list[Array] | None
    """Per record, the points that a segment's begins and ends are numbers of; None: all of them, in order."""

    def place(self, record: int, number: int) -> int:
        return record * self.num_points + (number if self.pinned is None else int(self.pinned[record][number]))


class Shelf:
    """Opened shards. Where all are as likely to be needed next, closing the oldest is as good as any rule."""

    def __init__(self, shards: ShardSet, *, by_segments: bool = False) -> None:
        self._shards, self._by_segments = shards, by_segments
        self._open: dict[str, Shelved] = {}

    def shard(self, receipt: Receipt) -> Shelved:
        stem = receipt.stem
        if stem not in self._open:
            shelved = self._open[stem] = _shelved(self._shards.read(receipt), self._pinned_contract)
            while len(self._open) > (
                MAX_WHOLE_SHARDS if isinstance(shelved.reader, LibraryReader) else MAX_OPEN_SHARDS
            ):
                del self._open[next(iter(self._open))]
        return self._open[stem]

    @property
    def _pinned_contract(self) -> Contract | None:
        return self._shards.contract if self._by_segments else None


def _shelved(reader: ShardReader, pinned_by: Contract | None) -> Shelved:
    receipt, header = reader.receipt, reader.header
    pinned = [] if pinned_by is None else [pinned_points(pinned_by, key) for key in header.keys]
    num_points = receipt.num_points

    def read(index: int, out: memoryview) -> None:
        reader.read_point(*divmod(index, num_points), out)

    return Shelved(
        reader=reader,
        stem=receipt.stem,
        num_points=num_points,
        read=reader.tables.points.read if isinstance(reader, OffsetReader) else read,
        timesteps=header.timesteps.ravel(),
        sigmas=header.sigmas.ravel(),
        expert=header.expert.ravel(),
        pinned=[points for points in pinned if points is not None] or None,
    )


class Text(NamedTuple):
    rows: Array  # [L, D]
    is_cut: bool


class Texts:
    """Texts that were read lately, cut to what the student takes."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._kept: dict[TextName, Text] = {}
        self._num_bytes = 0

    def get(self, shard: Shelved, record: int) -> tuple[TextName, Text]:
        name = (shard.stem, shard.reader.header.prompt_of[record])
        text = self._kept.get(name)
        if text is None:
            rows = shard.reader.read_text(name[1])
            text = Text(rows[: self._max_rows].copy(), len(rows) > self._max_rows)
            self._keep(name, text)
        return name, text

    def _keep(self, name: TextName, text: Text) -> None:
        self._kept[name] = text
        self._num_bytes += text.rows.nbytes
        while self._num_bytes > MAX_TEXT_BYTES and len(self._kept) > 1:
            self._num_bytes -= self._kept.pop(next(iter(self._kept))).rows.nbytes


class Found(NamedTuple):
    """Where a sample is."""

    shard: Shelved
    place: int
    """Of its point in the shard."""
    name: TextName
    text: Text


class Filler:
    """One reader of micro-batches: a thread's, or a process's."""

    def __init__(self, shards: ShardSet, *, text_rows: int, on_corrupt: str, by_segments: bool = False) -> None:
        self._shelf, self._texts = Shelf(shards, by_segments=by_segments), Texts(text_rows)
        self._skips = on_corrupt == "skip"

    def fill(self, slot: Slot, samples: Sequence[Sample], progress: Array) -> Filled:
        """`progress[0]` says which row is being worked on, to whoever waits."""
        found: dict[int, Found] = {}
        bad: dict[int, Corrupt] = {}
        # First all look-ups, then all reads: a read sweeps the caches, a look-up between two would wait for memory.
        for row, sample in enumerate(samples):
            progress[0] = row
            try:
                found[row] = self._look_up(sample)
            except (Corrupt, OSError) as error:
                bad[row] = self._pardoned(error, sample)
        for row, (shard, index, _, _) in list(found.items()):
            progress[0] = row
            try:
                slot.read_point(row, shard.read, index)
                if slot.plan.spans:
                    _read_end(slot, row, shard, samples[row])
            except (Corrupt, OSError) as error:
                bad[row] = self._pardoned(error, samples[row])
                del found[row]
        texts, num_cut = _write_columns(slot, found)
        _replace(slot, bad)
        longest = slot.write_texts(texts)
        told = [(row, f"{fault.wrong}; found: {fault.found}") for row, fault in sorted(bad.items())]
        return Filled(len(texts), longest, num_cut, told)

    def _look_up(self, sample: Sample) -> Found:
        receipt, record, point = sample
        shard = self._shelf.shard(receipt)
        name, text = self._texts.get(shard, record)
        return Found(shard, shard.place(record, point), name, text)

    def _pardoned(self, error: Corrupt | OSError, sample: Sample) -> Corrupt:
        """Damage, where it may be skipped; anything else is raised."""
        if isinstance(error, OSError):
            raise Partial(
                wrong=f"item {sample.receipt.item} cannot be read",
                found=f"{error.filename or sample.receipt.stem}: {error.strerror}",
                mend="look at the disk that holds the set, then run again",
            ) from None
        if not self._skips:
            raise error
        return error


def _read_end(slot: Slot, row: int, shard: Shelved, sample: Sample) -> None:
    """The state where the row's segment ends."""
    number = dict(slot.plan.spans or ())[sample.point]
    if number == FINAL:
        slot.ends["end"][row] = shard.reader.read_final(sample.record)
        slot.ends["end_sigmas"][row] = slot.ends["end_timesteps"][row] = 0.0
        return
    end = shard.place(sample.record, number)
    slot.read_end(row, shard.read, end)
    slot.ends["end_sigmas"][row], slot.ends["end_timesteps"][row] = shard.sigmas[end], shard.timesteps[end]


def _write_columns(slot: Slot, found: Mapping[int, Found]) -> tuple[list[Array], int]:
    """Noise levels and whose text is whose; the distinct texts, and how many samples have one that was cut."""
    rows = list(found)
    slot.timesteps[rows] = [shard.timesteps.item(index) for shard, index, _, _ in found.values()]
    slot.sigmas[rows] = [shard.sigmas.item(index) for shard, index, _, _ in found.values()]
    slot.expert[rows] = [shard.expert.item(index) for shard, index, _, _ in found.values()]
    texts = {name: text for _, _, name, text in found.values()}
    numbers = {name: number for number, name in enumerate(texts)}
    slot.inverse[rows] = [numbers[name] for _, _, name, _ in found.values()]
    return [text.rows for text in texts.values()], sum(text.is_cut for _, _, _, text in found.values())


def _replace(slot: Slot, bad: Mapping[int, Corrupt]) -> None:
    """The next good row takes the place of each bad one."""
    good = [row for row in range(slot.plan.num_samples) if row not in bad]
    for row, fault in sorted(bad.items()):
        if not good:
            raise fault
        slot.copy_row(next((later for later in good if later > row), good[0]), row)
