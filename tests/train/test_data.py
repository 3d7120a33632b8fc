"""From extents to tensors: the values of the records, whatever order they come in."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import BadUsage, Corrupt
from common.shards import ShardSet
from tests.made import NUMERICS, made_contract, made_record
from train.data import Feed, accumulation
from train.order import Order


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    shards = ShardSet.create(tmp_path / "set", made_contract())
    for start in range(0, 12, 4):
        shards.commit([made_record(number) for number in range(start, start + 4)], NUMERICS)
    return shards


def feed(shards: ShardSet, **changes: int) -> Feed:
    order = Order(0, lambda epoch: shards.manifest().receipts)
    values = {"global_batch": 6, "micro_batch": 3, "rank": 0, "world": 1} | changes
    return Feed(shards, order, deadline_s=20.0, **values)


def test_batches_hold_the_records_own_values(shards: ShardSet) -> None:
    by_item = shards.manifest().by_item
    steps = iter(feed(shards))
    for _ in range(9):
        step = next(steps)
        assert len(step.micros) == 2 and len(step.ids) == 6
        for number, name in enumerate(step.ids):
            item, index, point = name.split("/")
            record, k = shards.read(by_item[item]).record(int(index)), int(point)
            micro, row = step.micros[number // 3], number % 3
            for field in ("latents", "cond", "uncond"):
                np.testing.assert_array_equal(getattr(micro, field)[row].numpy(), getattr(record, field)[k])
            assert micro.timesteps[row] == record.timesteps[k] and micro.expert[row] == record.expert[k]
            text, length = micro.text[micro.inverse[row]], int(micro.lengths[micro.inverse[row]])
            np.testing.assert_array_equal(text[:length].numpy(), record.text)
            assert not text[length:].any()


def test_a_text_comes_once_a_batch(shards: ShardSet) -> None:
    step = next(iter(feed(shards, micro_batch=6)))
    (micro,) = step.micros
    assert len(micro.text) == len({tuple(row.flatten().tolist()) for row in micro.text})
    assert micro.inverse.dtype == torch.int64 and len(micro.inverse) == 6


def test_ranks_take_their_strides(shards: ShardSet) -> None:
    alone = next(iter(feed(shards, micro_batch=6)))
    parts = [next(iter(feed(shards, micro_batch=3, rank=rank, world=2))) for rank in range(2)]
    for rank, part in enumerate(parts):
        assert part.ids == alone.ids
        torch.testing.assert_close(part.micros[0].cond, alone.micros[0].cond[rank::2], rtol=0, atol=0)


def test_a_damaged_shard_stops_the_feed_by_name(shards: ShardSet) -> None:
    receipt = shards.manifest().receipts[1]
    path = shards.path / "shards" / receipt.shard / "points/0.0.0.0.0.0"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(Corrupt, match=receipt.item):
        for _, _step in zip(range(12), feed(shards), strict=False):
            pass


def test_a_global_batch_that_does_not_divide_names_the_nearest() -> None:
    assert accumulation(96, 16, 3) == 2
    with pytest.raises(BadUsage, match="set global_batch to 96 or 144"):
        accumulation(100, 16, 3)
