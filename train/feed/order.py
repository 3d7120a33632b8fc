"""Which sample comes when: one endless stream, a function of (seed, position). Numpy only.

    order = Order(seed, freeze)                  freeze(n) -> the receipts of epoch n, the same ones for ever
    batch = order.next_batch(96)                 96 samples of one picture size, for all ranks together
    batch.for_rank(rank, world)                  every rank's stride of it
    order.cursor                                 small, JSON; Order(seed, freeze, cursor) goes on from it

    receipts of an epoch -> per size: samples = (record, point) of what is not held out -> permuted by a keyed
    bijection computed where it is needed -> consumed in order; a batch may straddle two epochs of its size

A sample is a point (record, k). Each size has its own stream; the next batch comes from the stream that is furthest
behind, as a share of its epoch, so that sizes interleave in proportion. No state but the cursor: another number of
ranks sees the same global sequence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np

from common.errors import Partial
from common.manifest import Receipt
from common.record import Array
from train.feed.permutation import permuted

Size = tuple[int, int]
Points = tuple[int, ...]
ROW = np.dtype([("stem", "S32"), ("record", "<i4"), ("point", "<i4")])
"""A sample as numbers: what is permuted, cut into batches and handed to whoever reads."""
_BLOCK = 4096


class Sample(NamedTuple):
    """One point of one record."""

    receipt: Receipt
    record: int
    point: int

    @property
    def id(self) -> str:
        return f"{self.receipt.item}/{self.record}/{self.point}"


class Samples(Sequence[Sample]):
    """Rows, of which each becomes a Sample when somebody asks for it: a step needs few of them."""

    __slots__ = ("_receipts", "rows")

    def __init__(self, rows: Array, receipts: Mapping[bytes, Receipt]) -> None:
        self.rows, self._receipts = rows, receipts  # [N] ROW

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "Samples": ...
    def __getitem__(self, index: int | slice) -> "Sample | Samples":
        if isinstance(index, slice):
            return Samples(self.rows[index], self._receipts)
        stem, record, point = self.rows.item(index)
        return Sample(self._receipts[stem], record, point)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Samples) and np.array_equal(self.rows, other.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The samples of one optimizer step, of all ranks."""

    size: Size
    samples: Samples
    epoch: int

    def for_rank(self, rank: int, world: int) -> Samples:
        return self.samples[rank::world]


class Stream:
    """One size's samples in one epoch, in a permuted order. `points`: of each record only these."""

    def __init__(self, receipts: tuple[Receipt, ...], key: tuple[int, int], points: Points | None = None) -> None:
        self._key, self._points = key, None if points is None else np.array(points)
        self._stems = np.array([receipt.stem for receipt in receipts], ROW["stem"])
        kept = [np.flatnonzero(~receipt.held_out_records()) for receipt in receipts]
        self._num_points = np.array([len(points or range(receipt.num_points)) for receipt in receipts], np.int64)
        self._kept = np.concatenate([np.empty(0, np.int64), *kept])
        self._first_kept = np.cumsum([0, *map(len, kept)], dtype=np.int64)[:-1]
        self._ends = np.cumsum(self._num_points * [len(part) for part in kept], dtype=np.int64)
        self._length = int(self._ends[-1]) if len(self._ends) else 0
        self._block = -1, np.empty(0, ROW)

    def __len__(self) -> int:
        return self._length

    def run(self, first: int, count: int) -> list[Array]:
        """Rows of samples first..first+count-1, in parts. Permuted a block at a time: numpy costs the same for 32 as
        for a thousand."""
        parts: list[Array] = []
        while count:
            number, begin = divmod(first, _BLOCK)
            if self._block[0] != number:
                self._block = number, self._rows(number)
            parts.append(self._block[1][begin : begin + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return parts

    def _rows(self, block: int) -> Array:
        positions = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, len(self)))
        indices = permuted(positions, len(self), self._key)
        shards = np.searchsorted(self._ends, indices, side="right")
        begins = np.concatenate([[0], self._ends[:-1]])
        records, points = np.divmod(indices - begins[shards], self._num_points[shards])
        rows = np.empty(len(positions), ROW)
        rows["stem"] = self._stems[shards]
        rows["record"] = self._kept[self._first_kept[shards] + records]
        rows["point"] = points if self._points is None else self._points[points]
        return rows


@dataclass(slots=True)
class Place:
    """How far a size's stream has been read."""

    epoch: int = 0
    position: int = 0


class Order:
    """The endless sequence of batches."""

    def __init__(
        self,
        seed: int,
        freeze: Callable[[int], tuple[Receipt, ...]],
        cursor: Mapping[str, list[int]] | None = None,
        *,
        points: Points | None = None,
    ) -> None:
        """`points`: of each record only these are samples."""
        self._seed, self._freeze, self._points = seed, freeze, points
        self._epochs: dict[int, dict[Size, Stream]] = {}
        self._receipts: dict[bytes, Receipt] = {}
        """Of all epochs, by stem."""
        places = {_size(name): Place(*place) for name, place in (cursor or {}).items()}
        self._places: dict[Size, Place] = places or {size: Place() for size in self._streams(0)}

    @property
    def cursor(self) -> dict[str, list[int]]:
        return {f"{h}x{w}": [place.epoch, place.position] for (h, w), place in sorted(self._places.items())}

    def is_known(self, num_samples: int) -> bool:
        """Whether the next batch needs no epoch that is not frozen yet. All ranks must ask for a new one at the same
        step: rank 0 freezes it, the others wait for that, and it must not be waiting for them in a collective."""
        size = self._next_size()
        place = self._places[size]
        known = (self._epochs.get(epoch, {}).get(size, ()) for epoch in (place.epoch, place.epoch + 1))
        return sum(map(len, known)) - place.position >= num_samples

    def next_batch(self, num_samples: int) -> Batch:
        size = self._next_size()
        place = self._places[size]
        first_epoch = place.epoch
        parts: list[Array] = []
        wanted = num_samples
        while wanted:
            stream = self._streams(place.epoch).get(size)
            left = len(stream) - place.position if stream else 0
            if stream and left:
                take = min(left, wanted)
                parts += stream.run(place.position, take)
                place.position, wanted = place.position + take, wanted - take
            else:
                self._turn_the_page(size)
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return Batch(size=size, samples=Samples(rows, self._receipts), epoch=first_epoch)

    def epoch_length(self, epoch: int) -> int:
        return sum(len(stream) for stream in self._streams(epoch).values())

    def _next_size(self) -> Size:
        if len(self._places) == 1:  # as nearly always
            return next(iter(self._places))
        return min(sorted(self._places), key=self._progress)

    def _turn_the_page(self, size: Size) -> None:
        place = self._places[size]
        place.epoch, place.position = place.epoch + 1, 0
        for new in self._streams(place.epoch):  # a size that joined the set meanwhile
            self._places.setdefault(new, Place(epoch=place.epoch))

    def _progress(self, size: Size) -> float:
        place = self._places[size]
        stream = self._streams(place.epoch).get(size)
        return place.epoch + (place.position / len(stream) if stream and len(stream) else 1.0)

    def _streams(self, epoch: int) -> dict[Size, Stream]:
        if epoch not in self._epochs:
            by_size: dict[Size, list[Receipt]] = {}
            for receipt in self._freeze(epoch):
                by_size.setdefault((receipt.height, receipt.width), []).append(receipt)
                self._receipts[receipt.stem.encode()] = receipt
            self._epochs[epoch] = {
                size: stream
                for size, receipts in sorted(by_size.items())
                if len(stream := Stream(tuple(receipts), (self._seed, epoch), self._points))
            }
            if not self._epochs[epoch]:
                raise Partial(
                    wrong=f"epoch {epoch} has nothing to train on",
                    found="no shard, or only held-out records",
                    mend="harvest more prompts",
                )
            for old in [number for number in self._epochs if number < epoch - 1]:
                del self._epochs[old]
        return self._epochs[epoch]


def _size(name: str) -> Size:
    height, width = name.split("x")
    return int(height), int(width)
