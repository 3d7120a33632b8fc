"""Records of a set that training looks at but does not learn from: to draw them, and to measure on them. No torch.

records = first_records(shards, 16)              held-out ones first, all of one picture size
records = held_out_records(shards, 64)           held-out ones alone, of one size
records = records_of_prompts(shards, prompts)    those prompts, or refused with what to do

The `found_...` forms say of each record where it stands too, so that `found_again` finds it in a set that has grown.
`pardon` is told of damage: it raises the fault (`strict`), or the next record is taken.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from common.cleaning import clean_prompt
from common.errors import Corrupt, Partial, Refused
from common.manifest import Receipt, whole_receipt
from common.record import Record
from common.shards import ASSETS, CONTRACT_NAME, ShardSet, is_held_out

SAMPLES = "samples"
"""Under a set's assets."""


class Chosen(NamedTuple):
    """Where a record stands, and which it is."""

    item: str
    number: int
    key: str


Found = tuple[Chosen, Record]
Pardon = Callable[[Corrupt], None]


def strict(fault: Corrupt) -> None:
    raise fault


def skipping(say: Callable[..., None]) -> Pardon:
    """Says it, once for each damage."""
    said: set[str] = set()

    def pardon(fault: Corrupt) -> None:
        if str(fault) not in said:
            said.add(str(fault))
            say("passed over a damaged record that was to be looked at", why=fault)

    return pardon


def first_records(shards: ShardSet, num: int, pardon: Pardon = strict) -> list[Record]:
    return [record for _, record in found_first(shards, shards.manifest().receipts, num, pardon)]


def held_out_records(shards: ShardSet, num: int, pardon: Pardon = strict) -> list[Record]:
    return [record for _, record in found_held_out(shards, shards.manifest().receipts, num, pardon)]


def records_of_prompts(shards: ShardSet, prompts: Sequence[str], pardon: Pardon = strict) -> list[Record]:
    return [record for _, record in found_of_prompts(shards, prompts, pardon)]


def found_first(shards: ShardSet, receipts: Sequence[Receipt], num: int, pardon: Pardon) -> list[Found]:
    """Held-out records first, in the receipts' order; all of one size."""
    if not receipts:
        raise _nothing(shards)
    same = _of_first_size(receipts)
    return _sound(shards, itertools.chain(_of_kind(same, True), _of_kind(same, False)), num, pardon)


def found_held_out(shards: ShardSet, receipts: Sequence[Receipt], num: int, pardon: Pardon) -> list[Found]:
    return _sound(shards, _of_kind(_of_first_size(with_held_out(receipts)), True), num, pardon)


def found_of_prompts(shards: ShardSet, prompts: Sequence[str], pardon: Pardon) -> list[Found]:
    """The first record of each prompt, of the samples' size or else of the set's first."""
    wanted = [clean_prompt(prompt) for prompt in prompts]
    found: dict[str, Found] = {}
    places = [(source, receipt) for source in _sources(shards) for receipt in source.manifest().receipts]
    if not places:
        raise _nothing(shards)
    for source, receipt in places:
        if _size(receipt) == _size(places[0][1]) and len(found) < len(set(wanted)):
            _find(source, receipt, wanted, found, pardon)
    missing = [prompt for prompt in wanted if prompt not in found]
    if missing:
        raise Refused(
            wrong=f"sample_prompts: the set holds no record of {len(missing)} of them",
            found=f"'{missing[0]}'; training has no text encoder",
            mend=f"python -m harvest add-samples {shards.path} CONFIG --prompt ..., or name prompts that it holds",
        )
    return [found[prompt] for prompt in wanted]


def found_again(shards: ShardSet, chosen: Iterable[Chosen], pardon: Pardon, say: Callable[..., None]) -> list[Found]:
    """Those that are still there; of the others it is said."""
    found = []
    for each in chosen:
        home = _home(shards, each)
        one = _read(*home, each.number, pardon) if home else None
        if one and one[0] == each:
            found.append(one)
        elif one or not home:
            say("a record that was looked at is gone from the set", item=each.item, record=each.key)
    return found


def with_held_out(receipts: Iterable[Receipt]) -> list[Receipt]:
    return [receipt for receipt in receipts if receipt.held_out_records().any()]


def num_held_out(records: Sequence[Record]) -> int:
    return sum(is_held_out(record.prompt) for record in records)


def samples_of(shards: ShardSet) -> ShardSet | None:
    """What the harvest drew to be looked at: a set within the set, of its picture size."""
    folder = shards.path / ASSETS / SAMPLES
    return ShardSet.open(folder) if (folder / CONTRACT_NAME).exists() else None


def _home(shards: ShardSet, chosen: Chosen) -> tuple[ShardSet, Receipt] | None:
    for source in _sources(shards):
        receipt = whole_receipt(source.receipt_path(chosen.item), f"{source.shards_dir}/")
        if receipt is not None and chosen.number < receipt.num_records:
            return source, receipt
    return None


def _sources(shards: ShardSet) -> list[ShardSet]:
    samples = samples_of(shards)
    return [shards] if samples is None else [samples, shards]


def _find(shards: ShardSet, receipt: Receipt, wanted: Sequence[str], found: dict[str, Found], pardon: Pardon) -> None:
    try:
        header = shards.read(receipt).header
    except Corrupt as fault:
        pardon(fault)
        return
    for index, number in enumerate(header.prompt_of):
        prompt = header.prompts[number]
        if prompt in wanted and prompt not in found and (one := _read(shards, receipt, index, pardon)):
            found[prompt] = one


def _sound(shards: ShardSet, places: Iterable[tuple[Receipt, int]], num: int, pardon: Pardon) -> list[Found]:
    """The first `num` that can be read."""
    read = (_read(shards, receipt, number, pardon) for receipt, number in places)
    return list(itertools.islice((one for one in read if one), num))


def _read(shards: ShardSet, receipt: Receipt, number: int, pardon: Pardon) -> Found | None:
    try:
        reader = shards.read(receipt)
        return Chosen(receipt.item, number, reader.header.keys[number]), reader.record(number)
    except Corrupt as fault:
        pardon(fault)
        return None


def _of_kind(receipts: Iterable[Receipt], held_out: bool) -> Iterator[tuple[Receipt, int]]:
    for receipt in receipts:
        for number in np.flatnonzero(receipt.held_out_records() == held_out):
            yield receipt, int(number)


def _of_first_size(receipts: Sequence[Receipt]) -> list[Receipt]:
    return [receipt for receipt in receipts if _size(receipt) == _size(receipts[0])]


def _size(receipt: Receipt) -> tuple[int, int]:
    return receipt.height, receipt.width


def _nothing(shards: ShardSet) -> Partial:
    return Partial(wrong=f"{shards.path} holds no record", found="0 receipts", mend="harvest first")
