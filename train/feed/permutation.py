"""A shuffle that needs no memory: where each position of an epoch goes, computed where it is asked for. Numpy only.

permuted(np.arange(64, 96), size=1_000_000, key=(seed, epoch))
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
_ROUNDS = 6


def permuted(positions: Integers, size: int, key: tuple[int, int]) -> Integers:
    """A bijection of 0..size-1, computed where it is needed: a Feistel network on the next even number of bits,
    walked until it lands inside (Black & Rogaway, 'Ciphers with Arbitrary Finite Domains', 2002)."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    salts = [
        np.uint64((key[0] * 0x9E3779B97F4A7C15 + key[1] * 0xD1B54A32D192ED03 + number) * 0x94D049BB133111EB % 2**64)
        for number in range(_ROUNDS)
    ]

    # A short epoch: all steps are taken at once, and the walk is by look-up.
    is_short = 1 << 2 * half <= 4 * len(positions)
    steps = _feistel(np.arange(1 << 2 * half, dtype=np.uint64), half, salts) if is_short else None
    out = np.asarray(positions, np.uint64).copy()
    outside = np.arange(len(out))
    while len(outside):
        out[outside] = _feistel(out[outside], half, salts) if steps is None else steps[out[outside]]
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, salts: Sequence[np.uint64]) -> NDArray[np.uint64]:
    width, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> width, values & mask
    for salt in salts:
        left, right = right, left ^ (_mixed(right, salt) & mask)
    return (left << width) | right


def _mixed(values: NDArray[np.uint64], salt: np.uint64) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014)."""
    z = values * np.uint64(0xBF58476D1CE4E5B9) + salt
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
