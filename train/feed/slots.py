"""Memory for one micro-batch. No torch: reading processes import this.

    plan = SlotPlan(contract=shards.contract, size=(512, 512), num_samples=32, text_rows=77)
    slot = Slot(plan, buffer)                          views into plan.num_bytes of anybody's memory

A text belongs to many samples: a slot holds its distinct texts once, and `inverse` says whose is whose.
train/feed/filling.py fills it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap

import numpy as np

from common.encoding import Encoding, PlainEncoding, encoding_of
from common.record import Array, Contract
from train.feed.order import ROW, Size

Spans = tuple[tuple[int, int], ...]
"""Begin -> end of a segment, both numbers among the points that every record keeps; FINAL: the record's end point."""
FINAL = -1
END_FIELDS = ("end", "end_timesteps", "end_sigmas")
UNFOUND = -1
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotPlan:
    """What lies in the slots of one picture size."""

    contract: Contract
    size: Size
    num_samples: int
    text_rows: int
    """Longer texts are cut to so many."""
    spans: Spans | None = None
    """With each point the state at its segment's end."""

    @property
    def state_shape(self) -> tuple[int, int, int]:
        height, width = (side // self.contract.latent_stride for side in self.size)
        return self.contract.latent_channels, height, width

    @property
    def encoding(self) -> Encoding:
        return encoding_of(self.contract, self.state_shape)

    @property
    def is_plain(self) -> bool:
        """What is stored is what training takes: nothing is decoded."""
        return isinstance(self.encoding, PlainEncoding)

    @property
    def num_bytes(self) -> int:
        return sum(_aligned(dtype, shape) for dtype, shape in self.areas().values())

    def areas(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Name -> dtype, shape; they follow each other. The text comes last: its untouched end takes no memory."""
        encoding, n = self.encoding, self.num_samples
        if self.is_plain:
            points = {"points": (encoding.dtype, (n, *encoding.point_shape))}
        else:
            decoded = encoding.unpack(np.zeros((1, *encoding.point_shape), encoding.dtype))
            points = {
                name: (field.dtype, (n, *field.shape[1:]))
                for name, field in zip(self.contract.point_fields, decoded, strict=True)
            }
        scalars = {"timesteps": "f4", "sigmas": "f4", "expert": "i8", "inverse": "i8", "lengths": "i8"}
        if self.spans:
            scalars |= {"end_timesteps": "f4", "end_sigmas": "f4"}
            points["end"] = (self.contract.storage_dtype, (n, *self.state_shape))
        text = (self.contract.storage_dtype, (n * self.text_rows * self.contract.text_dim,))
        return {
            "request": (ROW, (n,)),
            "known": (np.dtype("i8"), (n,)),
            "points_taken": (Marks.DTYPE, (n,)),
            "texts_taken": (Marks.DTYPE, (n,)),
            **{name: (np.dtype(dtype), (n,)) for name, dtype in scalars.items()},
            **points,
            "text": text,
        }


class Marks:
    """What somebody reads already. No lock: two who ask at once may both be told that it is theirs, and then write the
    same bytes."""

    DTYPE = np.dtype("u2")

    def __init__(self, by_whom: Array) -> None:
        self._array, self._by_whom = by_whom, by_whom.data

    def clear(self) -> None:
        self._array[:] = 0

    def take(self, number: int, reader: int) -> bool:
        before = self._by_whom[number]
        if not before:
            self._by_whom[number] = reader + 1
        return before in (0, reader + 1)  # its own already: taken by the dead one whose place it takes

    def of(self, reader: int) -> list[int]:
        """What it has taken, or the dead one whose place it takes."""
        return [number for number, by_whom in enumerate(self._array.tolist()) if by_whom == reader + 1]

    def end_at(self, count: int) -> None:
        """There are no more."""
        self._array[count:] = np.iinfo(self.DTYPE).max

    def some_are_left(self, reader: int) -> bool:
        by_whom = self._array.tolist()  # as it is now: others go on taking
        return 0 in by_whom or reader + 1 in by_whom


class Slot:
    """Views of one micro-batch's memory. `offset` says where it lies in memory that is shared."""

    def __init__(self, plan: SlotPlan, buffer: mmap | memoryview, *, offset: int = 0) -> None:
        self.plan, self.offset = plan, offset
        arrays: dict[str, Array] = {}
        begin = 0
        for name, (dtype, shape) in plan.areas().items():
            arrays[name] = np.frombuffer(buffer, dtype, int(np.prod(shape)), begin).reshape(shape)
            begin += _aligned(dtype, shape)
        self.points_taken, self.texts_taken = Marks(arrays["points_taken"]), Marks(arrays["texts_taken"])
        self._known, self.known = arrays["known"], arrays["known"].data
        """Of each row which prompt of its shard it has, see `known`."""
        self.request, self.timesteps, self.sigmas = arrays["request"], arrays["timesteps"], arrays["sigmas"]
        self.expert, self.inverse, self.lengths = arrays["expert"], arrays["inverse"], arrays["lengths"]
        self.ends = {name: arrays[name] for name in END_FIELDS if name in arrays}
        self._encoding, self._text = plan.encoding, arrays["text"]
        self._is_plain, names = plan.is_plain, plan.contract.point_fields
        if self._is_plain:
            self._rows = [row.data.cast("B") for row in arrays["points"]]
            self.buffers: list[tuple[memoryview]] | None = [(row,) for row in self._rows]
            """Per row what preadv fills; None: what is stored must be decoded."""
            self.fields = dict(zip(names, self._encoding.unpack(arrays["points"]), strict=True))
            """By name, [B, C, H, W] each."""
        else:
            self.buffers = None
            self._stored = np.empty((1, *self._encoding.point_shape), self._encoding.dtype)
            self.fields = {name: arrays[name] for name in names}
        self._fields = tuple(self.fields.values())

    def ask_for(self, rows: Array) -> None:  # [B] ROW
        self.request[:] = rows
        self._known[:] = 0
        self.points_taken.clear()
        self.texts_taken.clear()

    def read_point(self, row: int, read: Callable[[int, memoryview], None], index: int) -> None:
        if self._is_plain:
            read(index, self._rows[row])
            return
        read(index, self._stored.data.cast("B"))
        for area, decoded in zip(self._fields, self._encoding.unpack(self._stored), strict=True):
            area[row] = decoded[0]

    def read_end(self, row: int, read: Callable[[int, memoryview], None], index: int) -> None:
        """The state of another point: the end of the row's segment."""
        stored = np.empty((1, *self._encoding.point_shape), self._encoding.dtype)
        read(index, stored.data.cast("B"))
        self.ends["end"][row] = self._encoding.unpack(stored)[0][0]

    def text(self, num_texts: int, longest: int) -> Array:
        """[U, L, D]"""
        width = self.plan.contract.text_dim
        return self._text[: num_texts * longest * width].reshape(num_texts, longest, width)

    def copy_row(self, source: int, target: int) -> None:
        for area in (*self._fields, self.timesteps, self.sigmas, self.expert, self.inverse, *self.ends.values()):
            area[target] = area[source]


def known(prompt: int, length: int) -> int:
    """Number of a prompt in its shard, and its tokens, as one number that is stored at once: another process sees all
    of it, or 0."""
    return (prompt << 32 | length) + 1


def prompt_and_length(said: int) -> tuple[int, int]:
    return divmod(said - 1, 1 << 32)


def _aligned(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    num_bytes = dtype.itemsize * int(np.prod(shape))
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
