"""Rotary positions of a picture's tokens, bit for bit those of Wan's first frame.

    rotary = Rotary(config.rotary_split, config.rope_max_seq_len)
    query_BNAK = turned(query_BNAK, *rotary(rows, columns))

Suffixes: B batch, N tokens, A heads, K channels of a head, S positions along one side.
"""

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Cosines and sines of each token's place (RoFormer, arXiv 2104.09864); time stands still at angle 0."""

    cos_SK: Tensor
    sin_SK: Tensor

    def __init__(self, split: tuple[int, int, int], num_positions: int) -> None:
        super().__init__()
        self.split = split
        angles_SK = torch.cat([_angles(dim, num_positions) for dim in split], dim=1)
        self.register_buffer("cos_SK", angles_SK.cos().repeat_interleave(2, dim=1).float(), persistent=False)
        self.register_buffer("sin_SK", angles_SK.sin().repeat_interleave(2, dim=1).float(), persistent=False)

    def forward(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Two [1, rows * columns, 1, head_dim], in the order in which the patch embedding lays its tokens."""
        return self._laid_out(self.cos_SK, rows, columns), self._laid_out(self.sin_SK, rows, columns)

    def _laid_out(self, table_SK: Tensor, rows: int, columns: int) -> Tensor:
        assert max(rows, columns) <= table_SK.shape[0], "a side of the picture has more tokens than rope_max_seq_len"
        still, down, across = torch.split(table_SK, list(self.split), dim=1)
        parts = (still[:1].view(1, 1, -1), down[:rows].view(rows, 1, -1), across[:columns].view(1, columns, -1))
        return torch.cat([part.expand(rows, columns, -1) for part in parts], dim=-1).reshape(1, rows * columns, 1, -1)


def _angles(dim: int, num_positions: int, theta: float = 10000.0) -> Tensor:
    """[position, pair] in float64: Wan rounds to float32 only after cosine and sine."""
    frequencies = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    return torch.outer(torch.arange(num_positions), frequencies)


def turned(x_BNAK: Tensor, cos_1N1K: Tensor, sin_1N1K: Tensor) -> Tensor:
    """Neighbouring channels are the pair that turns."""
    even, odd = torch.unflatten(x_BNAK, -1, (-1, 2)).unbind(-1)
    cos, sin = cos_1N1K[..., 0::2], sin_1N1K[..., 1::2]
    out_BNAK = torch.empty_like(x_BNAK)
    out_BNAK[..., 0::2] = even * cos - odd * sin
    out_BNAK[..., 1::2] = even * sin + odd * cos
    return out_BNAK.type_as(x_BNAK)
