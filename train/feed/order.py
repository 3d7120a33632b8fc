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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import Partial
from common.manifest import Receipt

Size = tuple[int, int]
Points = tuple[int, ...]
Integers = NDArray[np.int64]
_ROUNDS = 6
_BLOCK = 1024


class Sample(NamedTuple):
    """One point of one record."""

    receipt: Receipt
    record: int
    point: int

    @property
    def id(self) -> str:
        return f"{self.receipt.item}/{self.record}/{self.point}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The samples of one optimizer step, of all ranks."""

    size: Size
    samples: tuple[Sample, ...]
    epoch: int

    def for_rank(self, rank: int, world: int) -> tuple[Sample, ...]:
        return self.samples[rank::world]


class Stream:
    """One size's samples in one epoch, in a permuted order. `points`: of each record only these."""

    def __init__(self, receipts: tuple[Receipt, ...], key: tuple[int, int], points: Points | None = None) -> None:
        self._receipts, self._key, self._points = receipts, key, None if points is None else np.array(points)
        kept = [np.flatnonzero(~receipt.held_out_records()) for receipt in receipts]
        self._num_points = np.array([len(points or range(receipt.num_points)) for receipt in receipts], np.int64)
        self._kept = np.concatenate([np.empty(0, np.int64), *kept])
        self._first_kept = np.cumsum([0, *map(len, kept)], dtype=np.int64)[:-1]
        self._ends = np.cumsum(self._num_points * [len(part) for part in kept], dtype=np.int64)
        self._block: tuple[int, list[Sample]] = (-1, [])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def run(self, first: int, count: int) -> list[Sample]:
        """Samples first..first+count-1. Permuted a block at a time: numpy costs the same for 32 as for a thousand."""
        samples: list[Sample] = []
        while len(samples) < count:
            number, begin = divmod(first + len(samples), _BLOCK)
            if self._block[0] != number:
                self._block = number, self._samples(number)
            samples += self._block[1][begin : begin + count - len(samples)]
        return samples

    def _samples(self, block: int) -> list[Sample]:
        positions = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, len(self)))
        indices = permuted(positions, len(self), self._key)
        shards = np.searchsorted(self._ends, indices, side="right")
        begins = np.concatenate([[0], self._ends[:-1]])
        records, points = np.divmod(indices - begins[shards], self._num_points[shards])
        records = self._kept[self._first_kept[shards] + records]
        points = points if self._points is None else self._points[points]
        receipts = map(self._receipts.__getitem__, shards.tolist())
        return list(map(Sample._make, zip(receipts, records.tolist(), points.tolist(), strict=True)))


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
        places = {_size(name): Place(*place) for name, place in (cursor or {}).items()}
        self._places: dict[Size, Place] = places or {size: Place() for size in self._streams(0)}

    @property
    def cursor(self) -> dict[str, list[int]]:
        return {f"{h}x{w}": [place.epoch, place.position] for (h, w), place in sorted(self._places.items())}

    def next_batch(self, num_samples: int) -> Batch:
        size = min(sorted(self._places), key=self._progress)
        place = self._places[size]
        first_epoch = place.epoch
        samples: list[Sample] = []
        while len(samples) < num_samples:
            stream = self._streams(place.epoch).get(size)
            left = len(stream) - place.position if stream else 0
            if stream and left:
                take = min(left, num_samples - len(samples))
                samples += stream.run(place.position, take)
                place.position += take
            else:
                self._turn_the_page(size)
        return Batch(size=size, samples=tuple(samples), epoch=first_epoch)

    def epoch_length(self, epoch: int) -> int:
        return sum(len(stream) for stream in self._streams(epoch).values())

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


def permuted(positions: Integers, size: int, key: tuple[int, int]) -> Integers:
    """A bijection of 0..size-1, computed where it is needed: a Feistel network on the next even number of bits,
    walked until it lands inside (Black & Rogaway, 'Ciphers with Arbitrary Finite Domains', 2002)."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    out = np.asarray(positions, np.uint64).copy()
    outside = np.ones(len(out), bool)
    while outside.any():
        out[outside] = _feistel(out[outside], half, mask, key)
        outside = out >= size
    return out.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, mask: np.uint64, key: tuple[int, int]) -> NDArray[np.uint64]:
    left, right = values >> np.uint64(half), values & mask
    for number in range(_ROUNDS):
        salt = (key[0] * 0x9E3779B97F4A7C15 + key[1] * 0xD1B54A32D192ED03 + number) * 0x94D049BB133111EB
        left, right = right, left ^ (_mixed(right, np.uint64(salt & 0xFFFF_FFFF_FFFF_FFFF)) & mask)
    return (left << np.uint64(half)) | right


def _mixed(values: NDArray[np.uint64], salt: np.uint64) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014)."""
    z = values * np.uint64(0xBF58476D1CE4E5B9) + salt
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _size(name: str) -> Size:
    height, width = name.split("x")
    return int(height), int(width)
