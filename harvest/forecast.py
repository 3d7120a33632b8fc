"""How many bytes a plan will write, before a weight is read.

    sizes = forecast(config, facts, plan, count_tokens)       Forecast: points, final, text, rest; .total

The shards' own containers pack each item's true header around arrays of one value; what the true arrays take is added.
So every index, gap and JSON digit is counted; of many items SAMPLED stand for all. Only what the teacher decides is
missing: digests are all of one length, and the measured error has three digits.
"""

import dataclasses
import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from common.encoding import encoding_of
from common.extents import CRC_BYTES
from common.log import human_bytes
from common.record import Contract, Numerics
from common.schedule import contract_grid, expert_of, kept_steps
from common.shard_header import PackedShard, ShardHeader
from common.shard_reader import CONTAINERS
from common.shards_tar import SUFFIX as TAR
from common.shards_zarr import ALIGNMENT
from harvest.config import HarvestConfig
from harvest.meaning import make_contract
from harvest.plan import SHARD_BYTES, Plan, WorkItem, record_bytes
from harvest.teacher import Fingerprints, TeacherFacts

SAMPLED = 16
RECEIPT_BYTES = 1200
BLOCK = 512
NO_PRINTS = Fingerprints(weights="0" * 64, text_encoder="0" * 64, tokenizer="0" * 64)
CountTokens = Callable[[list[str]], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Bytes by field."""

    points: int
    final: int
    text: int
    rest: int
    """Headers, indices, alignment, receipts."""

    @property
    def total(self) -> int:
        return self.points + self.final + self.text + self.rest

    def scaled(self, factor: float) -> "Forecast":
        return Forecast(**{name: round(size * factor) for name, size in dataclasses.asdict(self).items()})

    def __add__(self, other: "Forecast") -> "Forecast":
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return Forecast(**{name: mine[name] + theirs[name] for name in mine})


NOTHING = Forecast(points=0, final=0, text=0, rest=0)


def forecast(config: HarvestConfig, facts: TeacherFacts, plan: Plan, count_tokens: CountTokens) -> Forecast:
    contract = make_contract(config, facts, NO_PRINTS, config.teacher.dtype)
    out = NOTHING
    for size in dict.fromkeys((item.height, item.width) for item in plan.items):
        items = [item for item in plan.items if (item.height, item.width) == size]
        chosen = [items[index] for index in dict.fromkeys(np.linspace(0, len(items) - 1, SAMPLED).astype(int).tolist())]
        sampled = sum((shard_bytes(item, contract, config.container, count_tokens) for item in chosen), NOTHING)
        num_all, num_chosen = (sum(len(item.questions) for item in group) for group in (items, chosen))
        out += sampled.scaled(num_all / num_chosen)
    return out


def shard_bytes(item: WorkItem, contract: Contract, container: str, count_tokens: CountTokens) -> Forecast:
    """Of one shard and its receipt."""
    header = _header(item, contract, count_tokens)
    num_records, num_points = header.timesteps.shape
    side = contract.latent_stride
    state_shape = (contract.latent_channels, item.height // side, item.width // side)
    encoding, dtype = encoding_of(contract, state_shape), contract.storage_dtype
    point = int(np.prod(encoding.point_shape)) * encoding.dtype.itemsize
    final, row = int(np.prod(state_shape)) * dtype.itemsize, contract.text_dim * dtype.itemsize
    small = PackedShard(
        header=header,
        points=np.zeros((num_records, num_points, 1), np.uint8),
        final=np.zeros((num_records, 1), np.uint8),
        text=np.zeros((sum(header.text_lengths), 1), np.uint8),
    )
    files = CONTAINERS[container].pack(small)
    sizes = {"points": num_records * num_points * point, "final": num_records * final, "text": len(small.text) * row}
    if TAR in files:
        whole = _tar_bytes(files[TAR], num_points * point, final, row) + sum(
            len(data) for name, data in files.items() if name != TAR
        )
    else:
        gaps = num_records * num_points * (_step(point + CRC_BYTES) - _step(1 + CRC_BYTES))
        whole = sum(map(len, files.values())) + gaps + num_records * (final - 1) + len(small.text) * (row - 1)
    return Forecast(**sizes, rest=whole - sum(sizes.values()) + RECEIPT_BYTES)


def crowded(config: HarvestConfig, facts: TeacherFacts, items: Sequence[WorkItem], count_tokens: CountTokens
            ) -> Iterator[str]:  # fmt: skip
    """How many records a shard holds is decided by their arrays: where the texts are more than that, it is said. An
    item is the hash of its keys, so a set that was begun must not be packed anew behind anybody's back."""
    contract = make_contract(config, facts, NO_PRINTS, config.teacher.dtype)
    row = contract.text_dim * contract.storage_dtype.itemsize

    def at_most(item: WorkItem) -> int:
        prompts = _prompts_of(item)
        return row * sum(_text_lengths(prompts, contract, lambda asked: [len(prompt.encode()) + 2 for prompt in asked]))

    item = max(items, key=at_most, default=None)
    if item is None or at_most(item) <= SHARD_BYTES:
        return
    text, number = row * sum(_text_lengths(_prompts_of(item), contract, count_tokens)), len(item.questions)
    if text > SHARD_BYTES:
        arrays = number * record_bytes(config, facts, item.height, item.width)
        fitting = max(1, SHARD_BYTES * number // (text + arrays))
        yield (f"{human_bytes(text)} in a shard of {number} records, beside {human_bytes(arrays)} of arrays: "
               f"records_per_shard: {fitting} would keep both within {human_bytes(SHARD_BYTES)}")  # fmt: skip


def _prompts_of(item: WorkItem) -> list[str]:
    return list(dict.fromkeys(question.prompt for question in item.questions))


def _text_lengths(prompts: list[str], contract: Contract, count_tokens: CountTokens) -> list[int]:
    longest = contract.text_length
    padded = contract.text_padding != "zeros"
    return [longest if padded else min(count, longest) for count in count_tokens(prompts)]


def _header(item: WorkItem, contract: Contract, count_tokens: CountTokens) -> ShardHeader:
    prompts = _prompts_of(item)
    number = {prompt: index for index, prompt in enumerate(prompts)}
    lengths = _text_lengths(prompts, contract, count_tokens)
    levels = [_levels(question.key, contract) for question in item.questions]
    return ShardHeader(
        contract=contract.digest(),
        numerics=_numerics(),
        guided_error=0.000123,
        keys=tuple(question.key for question in item.questions),
        digests=("0" * 64,) * len(item.questions),
        seeds=tuple(question.seed for question in item.questions),
        height=item.height,
        width=item.width,
        prompts=tuple(prompts),
        prompt_of=tuple(number[question.prompt] for question in item.questions),
        text_lengths=tuple(lengths),
        timesteps=np.stack([timesteps for timesteps, _, _ in levels]),
        sigmas=np.stack([sigmas for _, sigmas, _ in levels]),
        expert=np.stack([experts for _, _, experts in levels]),
    )


def _levels(key: str, contract: Contract) -> Sequence[Any]:
    grid = contract_grid(contract, int(key, 16))
    experts = expert_of(grid.timesteps, contract.boundary, train_steps=contract.train_steps)
    kept = kept_steps(key, contract.steps, contract.keep, experts, contract.keep_at)
    return grid.timesteps[kept], grid.sigmas[:-1][kept], experts[kept]


def _numerics() -> Numerics:
    """Of the length that it will have, more or less."""
    return Numerics(micro_batch=4, batched_guidance=True, collapsed_padding=True, attention="sdpa", device="cpu",
                    threads=1, torch=version("torch"), diffusers=version("diffusers"))  # fmt: skip


def _tar_bytes(small: bytes, points: int, final: int, row: int) -> int:
    """Of a tar whose arrays are as large as they will be; its end is filled up as tarfile does it."""
    total = 0
    with tarfile.open(fileobj=io.BytesIO(small)) as tar:
        for info in tar:
            arrays = {"points.npy": points, "final.npy": final, "text.npy": (info.size - BLOCK) * row}
            data = arrays.get(info.name.partition(".")[2])
            size = info.size if data is None else BLOCK + data
            total += BLOCK + -(-size // BLOCK) * BLOCK
    return -(-(total + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _step(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT
