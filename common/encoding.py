"""How the fields of a point become bytes and come back. Which ones they are, the contract says: contract.point_fields.

encoding = encoding_of(contract, (16, 64, 64))
points = encoding.pack(latents, cond, uncond)          [K, *point_shape] of encoding.dtype: what a container stores
latents, cond, uncond = encoding.unpack(points)        or latents, guided

float16, float32   the fields as they are, [K, field, C, H, W]
int8-block64       [K, bytes]: latents in float16, then uncond and cond - uncond (or guided alone) as int8 in blocks of
                   64 over [C, H, W] in C order, then their float16 scales. The difference is coded, not cond itself:
                   guidance multiplies its error, and coding both branches apart would triple that.
"""

from typing import Protocol

import numpy as np

from common.record import Array, Contract

BLOCK = 64
INT8 = "int8-block64"


class Encoding(Protocol):
    dtype: np.dtype
    point_shape: tuple[int, ...]

    def pack(self, *fields: Array) -> Array: ...

    def unpack(self, points: Array) -> tuple[Array, ...]: ...


class PlainEncoding:
    """The fields side by side in one dtype."""

    def __init__(self, dtype: np.dtype, num_fields: int, state_shape: tuple[int, ...]) -> None:
        self.dtype, self.point_shape = dtype, (num_fields, *state_shape)

    def pack(self, *fields: Array) -> Array:
        return np.stack(fields, axis=1).astype(self.dtype, copy=False)

    def unpack(self, points: Array) -> tuple[Array, ...]:
        return tuple(points[:, field] for field in range(self.point_shape[0]))  # views: nothing is copied


class Int8Encoding:
    """Latents whole, predictions in a little more than a byte a value."""

    dtype = np.dtype(np.uint8)
    point_shape: tuple[int, ...]

    def __init__(self, num_fields: int, state_shape: tuple[int, ...]) -> None:
        self.state_shape, self.num_parts = state_shape, num_fields - 1
        self.num_values = int(np.prod(state_shape))
        self.num_blocks = -(-self.num_values // BLOCK)
        widths = [2 * self.num_values, *[self.num_values] * self.num_parts, *[2 * self.num_blocks] * self.num_parts]
        self._bounds = np.cumsum(widths)[:-1]
        self.point_shape = (sum(widths),)

    def pack(self, *fields: Array) -> Array:
        latents, *cond, base = (field.astype(np.float32, copy=False) for field in fields)
        parts = [self._quantized(part) for part in (base, *(branch - base for branch in cond))]
        columns = [latents.astype("<f2"), *(values for values, _ in parts), *(scales for _, scales in parts)]
        return np.concatenate([column.reshape(len(latents), -1).view(np.uint8) for column in columns], axis=1)

    def unpack(self, points: Array) -> tuple[Array, ...]:
        latents, *columns = np.split(np.ascontiguousarray(points), self._bounds, axis=1)
        shape = (len(points), *self.state_shape)
        coded = zip(columns[: self.num_parts], columns[self.num_parts :], strict=True)
        base, *differences = (self._restored(values, scales).reshape(shape) for values, scales in coded)
        cond = (base + difference for difference in differences)
        return np.ascontiguousarray(latents).view("<f2").reshape(shape), *cond, base

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
        return Int8Encoding(len(contract.point_fields), state_shape)
    return PlainEncoding(contract.storage_dtype, len(contract.point_fields), state_shape)
