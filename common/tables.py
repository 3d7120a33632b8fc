"""Where the pieces of a shard lie, whatever holds it: the one shape that every container answers in.

layout = Layout(...)                        what a receipt and a contract say there must be
tables = container.open(stem, layout, fail) header, and extents of points, finals and text rows
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from common.encoding import Encoding, encoding_of
from common.errors import Corrupt
from common.extents import Extents
from common.manifest import Receipt
from common.record import Contract
from common.shard_header import PackedShard, ShardHeader

Fail = Callable[[str, str], Corrupt]
"""(which part, what was found) -> the fault to raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How many pieces of which size a shard must have."""

    receipt: Receipt
    fields: tuple[str, ...]
    """Of a point."""
    encoding: Encoding
    state_shape: tuple[int, ...]
    state_dtype: np.dtype
    text_dim: int

    @property
    def num_points(self) -> int:
        return self.receipt.num_records * self.receipt.num_points

    @property
    def point_bytes(self) -> int:
        return int(np.prod(self.encoding.point_shape)) * self.encoding.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        return int(np.prod(self.state_shape)) * self.state_dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.text_dim * self.state_dtype.itemsize

    @classmethod
    def of(cls, receipt: Receipt, contract: Contract) -> "Layout":
        side = contract.latent_stride
        shape = (contract.latent_channels, receipt.height // side, receipt.width // side)
        return cls(receipt=receipt, fields=contract.point_fields, encoding=encoding_of(contract, shape),
                   state_shape=shape, state_dtype=contract.storage_dtype, text_dim=contract.text_dim)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """An opened shard."""

    header: ShardHeader
    points: Extents
    final: Extents
    text: Extents
    """One per token; the rows of a prompt lie side by side."""


class Container(Protocol):
    """A module that stores shards: shards_zarr, shards_tar."""

    def pack(self, shard: PackedShard) -> dict[str, bytes]:
        """The shard's files: what follows its stem -> bytes. The same shard gives the same bytes."""

    def open(self, stem: Path, layout: Layout, fail: Fail) -> Tables: ...

    def load(self, stem: Path) -> PackedShard:
        """All of it through the format's own library: slow, needs no receipt, the oracle of `open`."""


def names(
    layout: Layout, header: ShardHeader
) -> tuple[Callable[[int], str], Callable[[int], str], Callable[[int], str]]:
    """What an error calls a point, a final and a text row."""
    item, fields = f"item {layout.receipt.item}", "/".join(layout.fields)

    def point(index: int) -> str:
        record, number = divmod(index, layout.receipt.num_points)
        return f"{item}, record {header.keys[record]}, point {number} ({fields})"

    def final(index: int) -> str:
        return f"{item}, record {header.keys[index]}, final"

    def text(index: int) -> str:
        prompt = int(np.searchsorted(header.text_starts, index, side="right")) - 1
        users = [key for key, used in zip(header.keys, header.prompt_of, strict=True) if used == prompt]
        return f"{item}, record {users[0]}, text row {index - int(header.text_starts[prompt])}"

    return point, final, text
