"""`harvest verify --recompute 0.1%`: the teacher asked again for a sample of records, against silent hardware errors.

    for line in recompute(config, set_dir, share=0.001): ...      raises Corrupt when one is not what it was

With equal numerics a record must come back bit for bit; with others (another GPU, batch or library), or where nothing
says what was walked with it, within MAX_ERROR of what is stored, in the guided prediction and the end point.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.errors import Corrupt
from common.manifest import Receipt
from common.record import Contract, Record
from common.shard_header import pack_records, record_of
from harvest.config import HarvestConfig
from harvest.granary.again import Asked, asked_again, batches_of, task_for, walked_as

MAX_ERROR = 0.02
"""Relative L2. Other numerics move last bits; a path of many steps carries them on."""
SAMPLE_SEED = 0


def recompute(config: HarvestConfig, set_dir: Path, share: float) -> Iterator[str]:
    """Whole micro-batches, drawn over all shards: no more than must be walked for that share of the records."""
    task = task_for(config, set_dir)
    with asked_again(task) as asked:
        num_equal, num_close, worst, wrong = 0, 0, 0.0, []
        for receipt, keys in _sample(asked, share):
            reader = asked.shards.read(receipt)
            digests = dict(zip(reader.header.keys, reader.header.digests, strict=True))
            walked, is_known = walked_as(task, reader.header.keys, receipt.item)
            bitwise = is_known and receipt.numerics == asked.numerics
            for record in asked.records(keys, [walked]):
                packed = pack_records([record], asked.shards.contract, asked.numerics)
                if packed.header.digests[0] == digests[record.key]:
                    num_equal += 1
                    continue
                before = reader.record(reader.header.keys.index(record.key))
                error = difference(record_of(packed, 0, asked.shards.contract), before, asked.shards.contract)
                worst = max(worst, error)
                if bitwise or error > MAX_ERROR:
                    wrong.append(f"item {receipt.item}, record {record.key}: {error:.2g} away")
                    yield wrong[-1]
                else:
                    num_close += 1
        if wrong:
            raise Corrupt(
                wrong=f"{len(wrong)} of {num_equal + num_close + len(wrong)} records do not come back",
                found=wrong[0],
                mend="ask again on another device: what differs twice is damaged in the set, else this device errs",
            )
        why = "other numerics, or nothing says what was walked with them"
        yield f"{num_equal} records asked again came back bit for bit, {num_close} within {worst:.2g} ({why})"


def _sample(asked: Asked, share: float) -> Iterator[tuple[Receipt, set[str]]]:
    rng = np.random.default_rng(SAMPLE_SEED)
    receipts = asked.shards.manifest().receipts
    num_wanted = max(1, round(share * asked.shards.manifest().num_records))
    for index in rng.permutation(len(receipts)):
        if num_wanted <= 0:
            return
        receipt = receipts[index]
        keys = asked.shards.read(receipt).header.keys
        batches = batches_of(walked_as(asked.task, keys, receipt.item)[0], asked.task.config.micro_batch)
        for number in rng.permutation(len(batches))[: max(1, round(share * len(batches)))]:
            batch = {question.key for question in batches[number]} & set(keys)
            num_wanted -= len(batch)
            yield receipt, batch


def difference(mine: Record, theirs: Record, contract: Contract) -> float:
    """Of two records, as a share of the second: the worse of guided prediction and end point."""
    guided = [record.combination(contract) for record in (mine, theirs)]
    final = [r.final.astype(np.float32) for r in (mine, theirs)]
    return max(_relative(*guided), _relative(*final))


def _relative(mine: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(mine - theirs) / max(float(np.linalg.norm(theirs)), 1e-12))
