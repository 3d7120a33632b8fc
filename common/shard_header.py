"""What a shard says of its records besides their arrays, and the arrays as a container takes them.

    packed = pack_records(records, contract, numerics)      PackedShard: header, points, final, text
    header = ShardHeader.from_json(packed.header.to_json())

The same in every container: Zarr and tar differ only in where these bytes lie.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from common.encoding import encoding_of
from common.record import Array, Contract, Numerics, Record, item_id


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShardHeader:
    """Keys, prompts, seeds and noise levels of a shard's records, R of them with K points each."""

    contract: str
    """Digest of what the records mean: a shard alone still says whose it is."""
    numerics: Numerics
    guided_error: float
    """Relative L2 error of the encoding on the guided prediction: the worst record, at the set's own guidance."""
    keys: tuple[str, ...]
    digests: tuple[str, ...]
    seeds: tuple[int, ...]
    height: int
    width: int
    prompts: tuple[str, ...]
    """Distinct, in order of first use."""
    prompt_of: tuple[int, ...]
    text_lengths: tuple[int, ...]
    """Tokens of each distinct prompt; their rows follow each other."""
    timesteps: NDArray[np.float32]  # [R, K]
    sigmas: NDArray[np.float32]  # [R, K]
    expert: NDArray[np.uint8]  # [R, K]

    @property
    def item(self) -> str:
        return item_id(list(self.keys))

    @property
    def text_starts(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.text_lengths)[:-1]]).astype(np.int64)

    def text_rows(self, prompt: int) -> slice:
        start = sum(self.text_lengths[:prompt])  # a tenth of what an array of all starts takes
        return slice(start, start + self.text_lengths[prompt])

    def to_json(self) -> dict[str, Any]:
        """JSON keeps a float32 exactly: it is written as the double that it is."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {name: value.tolist() for name, value in values.items() if isinstance(value, np.ndarray)}
        return {"item": self.item, **values, **plain, "numerics": dataclasses.asdict(self.numerics)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        for name in ("keys", "digests", "seeds", "prompts", "prompt_of", "text_lengths"):
            fields[name] = tuple(fields[name])
        for name, dtype in (("timesteps", np.float32), ("sigmas", np.float32), ("expert", np.uint8)):
            fields[name] = np.array(fields[name], dtype)
        header = cls(**{**fields, "numerics": Numerics(**fields["numerics"])})
        _require_consistent(header)
        return header


def _require_consistent(header: ShardHeader) -> None:
    """A header may come from anywhere: its columns must be of one length and its numbers must point inside."""
    num_records = len(header.keys)
    columns = (header.digests, header.seeds, header.prompt_of, header.timesteps, header.sigmas, header.expert)
    if any(len(column) != num_records for column in columns) or header.timesteps.ndim != 2:
        raise ValueError("columns of different lengths")
    if not header.timesteps.shape == header.sigmas.shape == header.expert.shape:
        raise ValueError("noise levels of different shapes")
    if len(header.text_lengths) != len(header.prompts) or not all(
        0 <= n < len(header.prompts) for n in header.prompt_of
    ):
        raise ValueError("prompts and texts do not match")
    if not all(type(length) is int and length > 0 for length in header.text_lengths):
        raise ValueError("texts without rows")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedShard:
    """A shard in memory, as any container stores it."""

    header: ShardHeader
    points: Array  # [R, K, *point_shape] in the encoding's dtype
    final: Array  # [R, C, H, W]
    text: Array  # [tokens, D]


def pack_records(records: Sequence[Record], contract: Contract, numerics: Numerics) -> PackedShard:
    """Digests are taken over the records as they will be read, so they are the same in every container."""
    dtype = contract.storage_dtype
    encoding, names = encoding_of(contract, records[0].final.shape), contract.point_fields
    assert all(record.point_fields == names for record in records), f"the set holds {names}"
    points = [encoding.pack(*(getattr(record, name) for name in names)) for record in records]
    stored = [as_stored(record, contract, rows) for record, rows in zip(records, points, strict=True)]
    by_prompt = {record.prompt: record.text for record in stored}
    prompts = tuple(by_prompt)
    index = {prompt: i for i, prompt in enumerate(prompts)}
    header = ShardHeader(
        contract=contract.digest(),
        numerics=numerics,
        guided_error=three_digits(max(_guided_error(contract, *pair) for pair in zip(records, stored, strict=True))),
        keys=tuple(record.key for record in stored),
        digests=tuple(record.digest() for record in stored),
        seeds=tuple(record.seed for record in stored),
        height=stored[0].height,
        width=stored[0].width,
        prompts=prompts,
        prompt_of=tuple(index[record.prompt] for record in stored),
        text_lengths=tuple(len(by_prompt[prompt]) for prompt in prompts),
        timesteps=np.stack([record.timesteps for record in stored]),
        sigmas=np.stack([record.sigmas for record in stored]),
        expert=np.stack([record.expert for record in stored]),
    )
    text = np.concatenate([by_prompt[prompt] for prompt in prompts]).astype(dtype, copy=False)
    return PackedShard(
        header=header, points=np.stack(points), final=np.stack([record.final for record in stored]), text=text
    )


def as_stored(record: Record, contract: Contract, points: Array) -> Record:
    """The record that a reader will get back."""
    dtype = contract.storage_dtype
    fields = fields_of(contract, record.final.shape, points)
    return dataclasses.replace(record, text=record.text.astype(dtype), final=record.final.astype(dtype), **fields)


def fields_of(contract: Contract, state_shape: tuple[int, ...], points: Array) -> dict[str, Any]:
    """The arrays of a record's points [K, *point_shape], by name."""
    return dict(zip(contract.point_fields, encoding_of(contract, state_shape).unpack(points), strict=True))


def three_digits(number: float) -> float:
    return float(f"{number:.3g}")


def _guided_error(contract: Contract, record: Record, stored: Record) -> float:
    """Of the guided prediction, relative to its norm."""
    true, found = record.combination(contract), stored.combination(contract)
    norm = float(np.linalg.norm(true))
    return float(np.linalg.norm(found - true)) / norm if norm else 0.0


def make_record(
    header: ShardHeader, index: int, contract: Contract, *, points: Array, final: Array, text: Array
) -> Record:
    """One record from its stored pieces."""
    prompt = header.prompt_of[index]
    return Record(
        key=header.keys[index],
        prompt=header.prompts[prompt],
        seed=header.seeds[index],
        height=header.height,
        width=header.width,
        text=text,
        timesteps=header.timesteps[index],
        sigmas=header.sigmas[index],
        expert=header.expert[index],
        final=final,
        **fields_of(contract, final.shape, points),
    )


def record_of(shard: PackedShard, index: int, contract: Contract) -> Record:
    """One record out of a packed shard."""
    text = shard.text[shard.header.text_rows(shard.header.prompt_of[index])]
    return make_record(shard.header, index, contract, points=shard.points[index], final=shard.final[index], text=text)
