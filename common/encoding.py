"""How the three fields of a point become bytes and come back.

encoding = encoding_of(contract, (16, 64, 64))
points = encoding.pack(latents, cond, uncond)          [K, *point_shape] of encoding.dtype: what a container stores
latents, cond, uncond = encoding.unpack(points)

float16, float32   the fields as they are, [K, field, C, H, W]
int8-block64       [K, bytes]: latents in float16, then uncond and cond - uncond as int8 in blocks of 64 over
                   [C, H, W] in C order, then their float16 scales. The difference is coded, not cond itself:
                   guidance multiplies its error, and coding both branches apart would triple that.
"""

from typing import Protocol

import numpy as np

from common.record import Array, Contract

FIELDS = ("latents", "cond", "uncond")
BLOCK = 64
INT8 = "int8-block64"


class Encoding(Protocol):
    dtype: np.dtype
    point_shape: tuple[int, ...]

    def pack(self, latents: Array, cond: Array, uncond: Array) -> Array: ...

    def unpack(self, points: Array) -> tuple[Array, Array, Array]: ...


class PlainEncoding:
    """The fields side by side in one dtype."""

    def __init__(self, dtype: np.dtype, state_shape: tuple[int, ...]) -> None:
        self.dtype, self.point_shape = dtype, (len(FIELDS), *state_shape)

    def pack(self, latents: Array, cond: Array, uncond: Array) -> Array:
        return np.stack([latents, cond, uncond], axis=1).astype(self.dtype, copy=False)

    def unpack(self, points: Array) -> tuple[Array, Array, Array]:
        latents, cond, uncond = (points[:, field] for field in range(len(FIELDS)))  # views: nothing is copied
        return latents, cond, uncond


class Int8Encoding:
    """Latents whole, predictions in a little more than a byte a value."""

    dtype = np.dtype(np.uint8)
    point_shape: tuple[int, ...]

    def __init__(self, state_shape: tuple[int, ...]) -> None:
        self.state_shape = state_shape
        self.num_values = int(np.prod(state_shape))
        self.num_blocks = -(-self.num_values // BLOCK)
        self.point_shape = (4 * self.num_values + 4 * self.num_blocks,)

    def pack(self, latents: Array, cond: Array, uncond: Array) -> Array:
        uncond32 = uncond.astype(np.float32)
        parts = [self._quantized(uncond32), self._quantized(cond.astype(np.float32) - uncond32)]
        columns = [latents.astype("<f2"), *(values for values, _ in parts), *(scales for _, scales in parts)]
        return np.concatenate([column.reshape(len(latents), -1).view(np.uint8) for column in columns], axis=1)

    def unpack(self, points: Array) -> tuple[Array, Array, Array]:
        n, blocks = self.num_values, self.num_blocks
        bounds = np.cumsum([2 * n, n, n, 2 * blocks])
        latents, uncond, difference, uncond_scale, scale = np.split(np.ascontiguousarray(points), bounds, axis=1)
        shape = (len(points), *self.state_shape)
        base = self._restored(uncond, uncond_scale).reshape(shape)
        cond = base + self._restored(difference, scale).reshape(shape)
        return np.ascontiguousarray(latents).view("<f2").reshape(shape), cond, base

    def _quantized(self, values: Array) -> tuple[Array, Array]:
        """[K, ...] -> int8 [K, n] and float16 scales [K, blocks]."""
        flat = values.reshape(len(values), -1)
        padded = np.zeros((len(flat), self.num_blocks * BLOCK), np.float32)
        padded[:, : self.num_values] = flat
        blocks = padded.reshape(len(flat), self.num_blocks, BLOCK)
        scales = (np.abs(blocks).max(axis=2) / 127).astype("<f2")
        # The scale is rounded first, then divided by: what is stored is what is multiplied by. It may round to zero.
        divisor = np.where(scales > 0, scales, 1).astype(np.float32)[:, :, None]
        quantized = np.clip(np.rint(blocks / divisor), -127, 127).astype(np.int8)
        quantized[scales == 0] = 0
        return quantized.reshape(len(flat), -1)[:, : self.num_values], scales

    def _restored(self, quantized: Array, scales: Array) -> Array:
        per_value = np.repeat(np.ascontiguousarray(scales).view("<f2").astype(np.float32), BLOCK, axis=1)
        values = np.ascontiguousarray(quantized).view(np.int8).astype(np.float32)
        restored: Array = values * per_value[:, : self.num_values]
        return restored


def encoding_of(contract: Contract, state_shape: tuple[int, ...]) -> Encoding:
    if contract.encoding == INT8:
        return Int8Encoding(state_shape)
    return PlainEncoding(contract.storage_dtype, state_shape)
