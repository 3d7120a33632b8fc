"""Opened shards and texts that were read lately, so laid out that a sample is found with few touches. No torch.

shard = Shelf(shards, by_segments=False).shard(b"<stem>")          opened once, held while it is among the last
number = shard.point(record, point)
shard.known(number), shard.place(number)                           its noise level, where it lies
text = Texts(max_rows=77).get((b"<stem>", prompt), shard.reader)
"""

import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from common.errors import Refused
from common.manifest import Receipt
from common.record import Array
from common.schedule import pinned_points
from common.shard_reader import LibraryReader, OffsetReader, ShardReader
from common.shards import ShardSet

MAX_OPEN_SHARDS, MAX_WHOLE_SHARDS = 256, 4
"""Whole: what the format's library reads is held in memory, all of it."""
MAX_TEXT_BYTES = 64 << 20
"""Of texts that are kept for the next micro-batch that needs them."""
FACTS = np.dtype([("timestep", "<f4"), ("sigma", "<f4"), ("expert", "<i4"), ("prompt", "<i4"), ("length", "<i4")])
"""What a shard's header says of a point. Side by side: reads sweep the caches, so each look-up waits for memory."""
_UNPACK = struct.Struct("<ffiii").unpack_from  # of FACTS: a quarter of the time that an array takes for its record
Facts = tuple[float, float, int, int, int]
"""Timestep, sigma, expert, number of the prompt in its shard, tokens of its text."""
TextName = tuple[bytes, int]
"""Stem of the shard, number of the prompt in it."""
Place = tuple[int, int]
"""Open file, offset."""


class Shelved(NamedTuple):
    """An opened shard, flat: what a sample wants of it, by record * num_points + point."""

    reader: ShardReader
    num_points: int
    place: Callable[[int], Place | None]
    """Of a point that was checked before."""
    read: Callable[[int, memoryview], None]
    """The stored bytes of a point into a buffer."""
    facts: bytes
    """[R * K] FACTS"""
    pinned: list[Array] | None
    """Per record, the points that a segment's begins and ends are numbers of; None: all of them, in order."""

    def point(self, record: int, number: int) -> int:
        return record * self.num_points + (number if self.pinned is None else int(self.pinned[record][number]))

    def known(self, number: int) -> Facts:
        return _UNPACK(self.facts, number * FACTS.itemsize)


class Shelf:
    """Opened shards. Where all are as likely to be needed next, closing the oldest is as good as any rule."""

    def __init__(self, shards: ShardSet, *, by_segments: bool) -> None:
        self._shards, self._by_segments = shards, by_segments
        self._open: dict[bytes, Shelved] = {}

    def shard(self, stem: bytes) -> Shelved:
        return self._open.get(stem) or self._opened(stem)

    def holds(self, stem: bytes) -> bool:
        return stem in self._open

    def _opened(self, stem: bytes) -> Shelved:
        shelved = self._open[stem] = self._shelved(self._shards.read(self._receipt(stem.decode())))
        is_whole = isinstance(shelved.reader, LibraryReader)
        while len(self._open) > (MAX_WHOLE_SHARDS if is_whole else MAX_OPEN_SHARDS):
            del self._open[next(iter(self._open))]
        return shelved

    def _receipt(self, stem: str) -> Receipt:
        """The one that the epoch was frozen with: its stem says its content."""
        item = item_of(stem)
        receipt = Receipt.read(self._shards.receipt_path(item))
        if receipt.stem != stem:
            raise Refused(
                wrong=f"item {item} is another than when its epoch began",
                found=f"{receipt.stem}, was {stem}",
                mend="start a new run, or restore the shard",
            )
        return receipt

    def _shelved(self, reader: ShardReader) -> Shelved:
        header, num_points = reader.header, reader.receipt.num_points
        facts = np.empty(header.timesteps.shape, FACTS)
        facts["timestep"], facts["sigma"], facts["expert"] = header.timesteps, header.sigmas, header.expert
        facts["prompt"] = np.array(header.prompt_of)[:, None]
        facts["length"] = np.array(header.text_lengths)[facts["prompt"]]
        contract = self._shards.contract
        pinned = [pinned_points(contract, key) for key in header.keys] if self._by_segments else []
        points = reader.tables.points if isinstance(reader, OffsetReader) else None

        def read(number: int, out: memoryview) -> None:
            reader.read_point(*divmod(number, num_points), out)

        return Shelved(
            reader=reader,
            num_points=num_points,
            place=(lambda number: None) if points is None else points.place,
            read=read if points is None else points.read,
            facts=facts.tobytes(),
            pinned=[kept for kept in pinned if kept is not None] or None,
        )


class Texts:
    """Texts that were read lately, cut to what the student takes."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._kept: dict[TextName, Array] = {}
        self._num_bytes = 0

    def get(self, name: TextName, reader: ShardReader) -> Array:  # [L, D]
        text = self._kept.get(name)
        return self._read(name, reader) if text is None else text

    def _read(self, name: TextName, reader: ShardReader) -> Array:
        text = self._kept[name] = reader.read_text(name[1])[: self.max_rows].copy()
        self._num_bytes += text.nbytes
        while self._num_bytes > MAX_TEXT_BYTES and len(self._kept) > 1:
            self._num_bytes -= self._kept.pop(next(iter(self._kept))).nbytes
        return text


def item_of(stem: str) -> str:
    return stem.partition("-")[0]
