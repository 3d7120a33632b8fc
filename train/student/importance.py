"""What a teacher's channels, heads and blocks are worth: by the norms of its weights, or by what a harvest saw there.

    importance = ByNorms(read, teacher)                        read(name) gives a weight
    importance = ByActivations(read, teacher, statistics)      a set's assets/activations.safetensors of one expert
    importance.flow("blocks.3.attn1")                          [D], one score per channel of the values

A weight that is large and never excited is worth nothing: |weight| x |activation| as in Wanda (Sun et al. 2306.11695),
summed over a channel; and a block that hardly moves its stream may go (ShortGPT, Men et al. 2403.03853).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from common.errors import BadUsage, Corrupt
from train.student.config import StudentConfig
from train.student.selection import columns_norm, rows_norm, spread

Read = Callable[[str], Tensor]
STATISTICS_NAME = "activations.safetensors"
"""Under a set's assets: see harvest/activations.py."""


class Importance(Protocol):
    """Larger is worth more."""

    name: str

    def blocks(self, wanted: int) -> list[int]:
        """Which blocks stay, ascending."""

    def residual(self, blocks: list[int]) -> Tensor:
        """[D]: channels of the stream that these blocks read and write."""

    def flow(self, part: str) -> Tensor:
        """[D]: value channels of an attention, head by head."""

    def hidden(self, writer: str, reader: str) -> Tensor:
        """[F]: channels between two linears."""


class ByNorms:
    """From the weights alone."""

    name = "weight norms"

    def __init__(self, read: Read, teacher: StudentConfig) -> None:
        self._read, self._teacher = read, teacher

    def blocks(self, wanted: int) -> list[int]:
        return spread(self._teacher.num_layers, wanted)

    def residual(self, blocks: list[int]) -> Tensor:
        """By the norm of all that writes into a channel, over the blocks that stay."""
        writers = ["patch_embedding.weight"]
        for block in blocks:
            writers += [f"blocks.{block}.{name}.weight" for name in ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")]
        squares = [rows_norm(self._read(name)).square() for name in writers]
        return sum(squares[1:], squares[0])

    def flow(self, part: str) -> Tensor:
        return rows_norm(self._read(f"{part}.to_v.weight")) * columns_norm(self._read(f"{part}.to_out.0.weight"))

    def hidden(self, writer: str, reader: str) -> Tensor:
        """By what enters times what leaves."""
        return rows_norm(self._read(writer)) * columns_norm(self._read(reader))


class ByActivations(ByNorms):
    """What was seen takes the place of what could enter."""

    name = "activations"

    def __init__(self, read: Read, teacher: StudentConfig, statistics: Mapping[str, Tensor]) -> None:
        super().__init__(read, teacher)
        self._seen = statistics

    def blocks(self, wanted: int) -> list[int]:
        """The first and the last, and between them those that move their stream most."""
        inner = range(1, self._teacher.num_layers - 1)
        if wanted <= 2:
            return super().blocks(wanted)
        moved = sorted(inner, key=lambda block: float(self._seen[f"blocks.{block}.change"]), reverse=True)
        return sorted([0, *moved[: wanted - 2], self._teacher.num_layers - 1])

    def residual(self, blocks: list[int]) -> Tensor:
        """Power of a channel over the blocks that stay, each block counting the same."""
        powers = [self._seen[f"blocks.{block}.residual"] for block in blocks]
        return torch.stack([power / power.mean() for power in powers]).sum(dim=0)

    def flow(self, part: str) -> Tensor:
        return self._seen[part].sqrt() * columns_norm(self._read(f"{part}.to_out.0.weight"))

    def hidden(self, writer: str, reader: str) -> Tensor:
        name = reader.removesuffix(".net.2.weight")
        if name not in self._seen:  # the embedders' were not watched
            return super().hidden(writer, reader)
        return self._seen[name].sqrt() * columns_norm(self._read(reader))


def read_statistics(path: Path, expert: str) -> dict[str, Tensor]:
    """Mean squares of one expert's channels, by the place where they were seen."""
    if not path.exists():
        raise BadUsage(
            wrong="--set holds no activation statistics",
            found=f"no {path}",
            mend="leave --set away: weight norms decide then; a harvest leaves them when it works its first item",
        )
    stored = load_file(path)
    odd = [name for name, value in stored.items() if not value.isfinite().all()]
    if odd:
        raise Corrupt(wrong=f"{path} holds NaN or Inf", found=odd[0], mend="remove it: weight norms decide then")
    return {name.removeprefix(f"{expert}."): value for name, value in stored.items() if name.startswith(f"{expert}.")}
