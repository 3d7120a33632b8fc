"""Records of a set that training looks at but does not learn from: to draw them, and to measure on them. No torch.

records = first_records(shards, 16)              held-out ones first, all of one picture size
records = held_out_records(shards, 64)           held-out ones alone, of that size
records = records_of_prompts(shards, prompts)    those prompts, or refused with what to do
"""

from collections.abc import Iterator, Sequence

import numpy as np

from common.cleaning import clean_prompt
from common.errors import Partial, Refused
from common.manifest import Receipt
from common.record import Record
from common.shards import ASSETS, CONTRACT_NAME, ShardSet, is_held_out

SAMPLES = "samples"
"""Under a set's assets."""


def first_records(shards: ShardSet, num: int) -> list[Record]:
    """Held-out records first, in the manifest's order; all of one size."""
    return _read(shards, [*_of_kind(shards, True, num), *_of_kind(shards, False, num)][:num])


def held_out_records(shards: ShardSet, num: int) -> list[Record]:
    return _read(shards, _of_kind(shards, True, num))


def records_of_prompts(shards: ShardSet, prompts: Sequence[str]) -> list[Record]:
    """The first record of each prompt, of the set's first size."""
    wanted = [clean_prompt(prompt) for prompt in prompts]
    found: dict[str, Record] = {}
    samples = samples_of(shards)
    for source in [shards] if samples is None else [samples, shards]:
        for receipt in _one_size(source):
            if len(found) < len(set(wanted)):
                _find(source, receipt, wanted, found)
    missing = [prompt for prompt in wanted if prompt not in found]
    if missing:
        raise Refused(
            wrong=f"sample_prompts: the set holds no record of {len(missing)} of them",
            found=f"'{missing[0]}'; training has no text encoder",
            mend=f"python -m harvest add-samples {shards.path} CONFIG --prompt ..., or name prompts that it holds",
        )
    return [found[prompt] for prompt in wanted]


def samples_of(shards: ShardSet) -> ShardSet | None:
    """What the harvest drew to be looked at: a set within the set, of its picture size."""
    folder = shards.path / ASSETS / SAMPLES
    return ShardSet.open(folder) if (folder / CONTRACT_NAME).exists() else None


def _find(shards: ShardSet, receipt: Receipt, wanted: Sequence[str], found: dict[str, Record]) -> None:
    reader = shards.read(receipt)
    for index, number in enumerate(reader.header.prompt_of):
        prompt = reader.header.prompts[number]
        if prompt in wanted and prompt not in found:
            found[prompt] = reader.record(index)


def num_held_out(records: Sequence[Record]) -> int:
    return sum(is_held_out(record.prompt) for record in records)


def _of_kind(shards: ShardSet, held_out: bool, num: int) -> list[tuple[Receipt, int]]:
    chosen: list[tuple[Receipt, int]] = []
    for receipt in _one_size(shards):
        chosen += [(receipt, int(index)) for index in np.flatnonzero(receipt.held_out_records() == held_out)]
        if len(chosen) >= num:
            break
    return chosen[:num]


def _one_size(shards: ShardSet) -> Iterator[Receipt]:
    receipts = shards.manifest().receipts
    if not receipts:
        raise Partial(wrong=f"{shards.path} holds no record", found="0 receipts", mend="harvest first")
    size = receipts[0].height, receipts[0].width
    return (receipt for receipt in receipts if (receipt.height, receipt.width) == size)


def _read(shards: ShardSet, places: Sequence[tuple[Receipt, int]]) -> list[Record]:
    return [shards.read(receipt).record(index) for receipt, index in places]
