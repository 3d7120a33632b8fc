"""A large picture through a network in overlapping tiles, whose edges fade into each other; many small ones in turns.

    pixels = in_tiles(decoder, latents, tile=128, overlap=32, scale=Fraction(8))        scale: of the output's sides

What fits into one tile goes through whole, bit for bit as without tiles.
"""

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor


def in_tiles(network: Callable[[Tensor], Tensor], x: Tensor, *, tile: int, overlap: int, scale: Fraction) -> Tensor:
    """x [B, C, H, W] -> [B, C', H * scale, W * scale]; `network` is given at most `tile` pixels a side, and no more
    pictures than one tile has room for: 64 of Wan's at 512x512 would be tensors of 13 GB."""
    height, width = x.shape[2:]
    together = max(1, tile * tile // (height * width))
    if len(x) > together:
        parts = [in_tiles(network, part, tile=tile, overlap=overlap, scale=scale) for part in x.split(together)]
        return torch.cat(parts)
    if max(height, width) <= tile:
        return network(x)
    out: Tensor | None = None
    total = torch.zeros(1, 1, int(height * scale), int(width * scale), device=x.device)
    unit = scale.denominator  # a tile that begins between two pixels of the output would be laid half a pixel off
    for top in begins(height, tile, overlap, unit):
        for left in begins(width, tile, overlap, unit):
            part = network(x[:, :, top : top + tile, left : left + tile])
            rows, columns = part.shape[2:]
            weight = (ramp(rows, int(overlap * scale))[:, None] * ramp(columns, int(overlap * scale))).to(x.device)
            down, right = int(top * scale), int(left * scale)
            if out is None:
                out = torch.zeros(*part.shape[:2], *total.shape[2:], device=x.device)
            out[:, :, down : down + rows, right : right + columns] += weight * part.float()
            total[:, :, down : down + rows, right : right + columns] += weight
    assert out is not None
    return (out / total).to(x.dtype)


def begins(length: int, tile: int, overlap: int, unit: int = 1) -> list[int]:
    """Where tiles begin along one side, at multiples of `unit`: they cover it, and neighbours share about `overlap`."""
    if length <= tile:
        return [0]
    num = -(-(length - overlap) // (tile - overlap))
    return [unit * round(number * (length - tile) / (num - 1) / unit) for number in range(num)]


def ramp(length: int, overlap: int) -> Tensor:
    """[length]: rises over the overlap, falls over it at the end; nowhere zero, so that edges of the picture count."""
    steps = torch.arange(1, length + 1, dtype=torch.float32)
    return (torch.minimum(steps, length + 1 - steps) / (overlap + 1)).clamp(max=1.0)
