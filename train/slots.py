"""Memory for one micro-batch, and how it is filled. No torch: reading processes import this.

    plan = SlotPlan(contract=shards.contract, size=(512, 512), num_samples=32, text_rows=77)
    slot = Slot(plan, buffer)                          views into plan.num_bytes of anybody's memory
    filled = Filler(shards, text_rows=77, on_corrupt="stop").fill(slot, samples, progress)

    samples -> each one's extent straight into its row, or decoded into it -> distinct texts, once each

A text belongs to many samples: a slot holds its distinct texts once, and `inverse` says whose is whose.
`on_corrupt: skip` puts the next good sample of the same micro-batch (the first, after the last) in the place of a
damaged one: the shape stays, nothing is weighted apart, and the result is a function of the micro-batch alone. A
micro-batch without one good sample stops all the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import NamedTuple

import numpy as np

from common.encoding import Encoding, PlainEncoding, encoding_of
from common.errors import Corrupt, Partial
from common.manifest import Receipt
from common.record import Array, Contract
from common.shard_reader import LibraryReader, ShardReader
from common.shards import ShardSet
from train.order import Sample, Size

MAX_OPEN_SHARDS, MAX_WHOLE_SHARDS = 256, 4
"""Whole: what the format's library reads is held in memory, all of it."""
MAX_TEXT_BYTES = 64 << 20
"""Of texts that are kept for the next micro-batch that needs them."""
REQUEST = np.dtype([("stem", "S32"), ("record", "<i4"), ("point", "<i4")])
"""How a sample is named in shared memory."""
_ALIGNMENT = 64
TextName = tuple[str, int]
"""Stem of the shard, number of the prompt in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotPlan:
    """What lies in the slots of one picture size."""

    contract: Contract
    size: Size
    num_samples: int
    text_rows: int
    """Longer texts are cut to so many."""

    @property
    def encoding(self) -> Encoding:
        height, width = (side // self.contract.latent_stride for side in self.size)
        return encoding_of(self.contract, (self.contract.latent_channels, height, width))

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
                for name, field in zip(("latents", "cond", "uncond"), decoded, strict=True)
            }
        scalars = {"timesteps": "f4", "sigmas": "f4", "expert": "i8", "inverse": "i8", "lengths": "i8"}
        text = (self.contract.storage_dtype, (n * self.text_rows * self.contract.text_dim,))
        return {
            "request": (REQUEST, (n,)),
            **{name: (np.dtype(dtype), (n,)) for name, dtype in scalars.items()},
            **points,
            "text": text,
        }


class Slot:
    """Views of one micro-batch's memory. `offset` says where it lies in memory that is shared."""

    def __init__(self, plan: SlotPlan, buffer: mmap | memoryview, *, offset: int = 0) -> None:
        self.plan, self.offset = plan, offset
        arrays: dict[str, Array] = {}
        begin = 0
        for name, (dtype, shape) in plan.areas().items():
            arrays[name] = np.frombuffer(buffer, dtype, int(np.prod(shape)), begin).reshape(shape)
            begin += _aligned(dtype, shape)
        self.request, self.timesteps, self.sigmas = arrays["request"], arrays["timesteps"], arrays["sigmas"]
        self.expert, self.inverse, self.lengths = arrays["expert"], arrays["inverse"], arrays["lengths"]
        self._encoding, self._text = plan.encoding, arrays["text"]
        self._is_plain = plan.is_plain
        if self._is_plain:
            self._rows = [row.data.cast("B") for row in arrays["points"]]
            self.latents, self.cond, self.uncond = self._encoding.unpack(arrays["points"])
        else:
            self._stored = np.empty((1, *self._encoding.point_shape), self._encoding.dtype)
            self.latents, self.cond, self.uncond = arrays["latents"], arrays["cond"], arrays["uncond"]

    def read_point(self, row: int, reader: ShardReader, record: int, point: int) -> None:
        if self._is_plain:
            reader.read_point(record, point, self._rows[row])
            return
        reader.read_point(record, point, self._stored.data.cast("B"))
        for area, decoded in zip(self._fields(), self._encoding.unpack(self._stored), strict=True):
            area[row] = decoded[0]

    def write_texts(self, texts: Sequence[Array]) -> int:
        """Side by side, each padded with zeros to the longest, whose length is returned."""
        lengths = [len(text) for text in texts]
        longest = max(lengths)
        for padded, text, length in zip(self.text(len(texts), longest), texts, lengths, strict=True):
            padded[:length] = text
            if length < longest:
                padded[length:] = 0
        self.lengths[: len(texts)] = lengths
        return longest

    def text(self, num_texts: int, longest: int) -> Array:
        """[U, L, D]"""
        width = self.plan.contract.text_dim
        return self._text[: num_texts * longest * width].reshape(num_texts, longest, width)

    def copy_row(self, source: int, target: int) -> None:
        for area in (*self._fields(), self.timesteps, self.sigmas, self.expert, self.inverse):
            area[target] = area[source]

    def _fields(self) -> tuple[Array, Array, Array]:
        return self.latents, self.cond, self.uncond


class Filled(NamedTuple):
    """What a filled slot holds beyond its fixed shapes."""

    num_texts: int
    longest: int
    num_cut: int
    """Samples whose text was cut."""
    skipped: list[tuple[int, str]]
    """Row, and what was found instead of the sample that stood there."""


class Shelf:
    """Opened shards. Where all are as likely to be needed next, closing the oldest is as good as any rule."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._open: dict[str, ShardReader] = {}

    def reader(self, receipt: Receipt) -> ShardReader:
        stem = receipt.stem
        if stem not in self._open:
            reader = self._open[stem] = self._shards.read(receipt)
            while len(self._open) > (MAX_WHOLE_SHARDS if isinstance(reader, LibraryReader) else MAX_OPEN_SHARDS):
                del self._open[next(iter(self._open))]
        return self._open[stem]


class Text(NamedTuple):
    rows: Array  # [L, D]
    is_cut: bool


class Texts:
    """Texts that were read lately, cut to what the student takes."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._kept: dict[TextName, Text] = {}
        self._num_bytes = 0

    def get(self, reader: ShardReader, prompt: int) -> Text:
        name = (reader.receipt.stem, prompt)
        if name not in self._kept:
            rows = reader.read_text(prompt)
            self._keep(name, Text(rows[: self._max_rows].copy(), len(rows) > self._max_rows))
        return self._kept[name]

    def _keep(self, name: TextName, text: Text) -> None:
        self._kept[name] = text
        self._num_bytes += text.rows.nbytes
        while self._num_bytes > MAX_TEXT_BYTES and len(self._kept) > 1:
            self._num_bytes -= self._kept.pop(next(iter(self._kept))).rows.nbytes


class Filler:
    """One reader of micro-batches: a thread's, or a process's."""

    def __init__(self, shards: ShardSet, *, text_rows: int, on_corrupt: str) -> None:
        self._shelf, self._texts = Shelf(shards), Texts(text_rows)
        self._skips = on_corrupt == "skip"

    def fill(self, slot: Slot, samples: Sequence[Sample], progress: Array) -> Filled:
        """`progress[0]` says which row is being read, to whoever waits."""
        texts: dict[TextName, tuple[int, Text]] = {}
        bad: list[tuple[int, Corrupt]] = []
        num_cut = 0
        for row, sample in enumerate(samples):
            progress[0] = row
            try:
                name, text = self._read(slot, row, sample)
            except Corrupt as fault:
                if not self._skips:
                    raise
                bad.append((row, fault))
                continue
            slot.inverse[row], _ = texts.setdefault(name, (len(texts), text))
            num_cut += text.is_cut
        _replace(slot, bad)
        longest = slot.write_texts([text.rows for _, text in texts.values()])
        return Filled(
            len(texts), longest, num_cut, [(row, f"{fault.wrong}; found: {fault.found}") for row, fault in bad]
        )

    def _read(self, slot: Slot, row: int, sample: Sample) -> tuple[TextName, Text]:
        """All of one sample into its row, but for the text."""
        receipt, record, point = sample
        try:
            reader = self._shelf.reader(receipt)
            header = reader.header
            prompt = header.prompt_of[record]
            text = self._texts.get(reader, prompt)
            slot.read_point(row, reader, record, point)
        except OSError as error:
            raise Partial(
                wrong=f"item {receipt.item} cannot be read",
                found=f"{error.filename or receipt.stem}: {error.strerror}",
                mend="look at the disk that holds the set, then run again",
            ) from None
        slot.timesteps[row] = header.timesteps[record, point]
        slot.sigmas[row] = header.sigmas[record, point]
        slot.expert[row] = header.expert[record, point]
        return (receipt.stem, prompt), text


def _replace(slot: Slot, bad: list[tuple[int, Corrupt]]) -> None:
    """The next good row takes the place of each bad one."""
    damaged = {row for row, _ in bad}
    good = [row for row in range(slot.plan.num_samples) if row not in damaged]
    for row, fault in bad:
        if not good:
            raise fault
        slot.copy_row(next((later for later in good if later > row), good[0]), row)


def _aligned(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    num_bytes = dtype.itemsize * int(np.prod(shape))
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
