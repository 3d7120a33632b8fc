"""One endless stream: every rank count sees the same sequence, every sample once an epoch."""

import base64
import dataclasses
from collections import Counter

import numpy as np
import pytest

from common.errors import Partial
from common.manifest import Receipt
from tests.made import NUMERICS
from train.feed.order import Order
from train.feed.permutation import permuted


def receipt(
    number: int, *, records: int = 5, points: int = 3, side: int = 64, held_out: tuple[int, ...] = ()
) -> Receipt:
    bits = np.zeros(records, bool)
    bits[list(held_out)] = True
    return Receipt(item=f"{number:016x}", container="zarr", stem=f"{number:016x}-00000000", contract="c",
                   num_records=records, num_points=points, height=side, width=side, num_tokens=1, guided_error=0.0,
                   guided_std=1.0, digest="d", files={}, numerics=NUMERICS,
                   held_out=base64.b64encode(np.packbits(bits).tobytes()).decode())  # fmt: skip


def fixed(*receipts: Receipt):  # type: ignore[no-untyped-def]
    return lambda epoch: receipts


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_the_permutation_is_a_bijection(size: int) -> None:
    for key in ((0, 0), (0, 1), (7, 3)):
        assert sorted(permuted(np.arange(size), size, key).tolist()) == list(range(size))


def test_the_permutation_is_computed_where_it_is_needed() -> None:
    whole = permuted(np.arange(1000), 1000, (3, 1))
    np.testing.assert_array_equal(permuted(np.array([999, 5, 17]), 1000, (3, 1)), whole[[999, 5, 17]])
    huge = permuted(np.arange(10), 10**12, (3, 1))
    assert len(set(huge.tolist())) == 10 and (huge < 10**12).all()


def test_epochs_and_seeds_shuffle_differently_and_evenly() -> None:
    orders = {tuple(permuted(np.arange(50), 50, (seed, epoch)).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    first = np.array([permuted(np.array([0]), 10, (seed, 0))[0] for seed in range(4000)])
    counts = np.bincount(first, minlength=10) / 4000
    assert (np.abs(counts - 0.1) < 0.025).all()


def test_every_sample_once_an_epoch_though_batches_straddle() -> None:
    receipts = [receipt(n, records=4 + n) for n in range(4)]
    length = sum(r.num_records * r.num_points for r in receipts)
    order = Order(0, fixed(*receipts))
    assert order.epoch_length(0) == length
    seen = [sample.id for _ in range(100) for sample in order.next_batch(7).samples]
    for start in range(0, len(seen) - length, length):
        assert len(set(seen[start : start + length])) == length
    assert seen[:length] != seen[length : 2 * length]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_any_number_of_ranks_sees_one_sequence(world: int) -> None:
    receipts = [receipt(n) for n in range(3)]
    alone = Order(5, fixed(*receipts))
    orders = [Order(5, fixed(*receipts)) for _ in range(world)]
    for _ in range(20):
        together = alone.next_batch(12)
        parts = [order.next_batch(12).for_rank(rank, world) for rank, order in enumerate(orders)]
        woven = [parts[i % world][i // world] for i in range(12)]
        assert [s.id for s in woven] == [s.id for s in together.samples]


@pytest.mark.parametrize("stop_after", range(0, 12))
def test_the_cursor_resumes_exactly(stop_after: int) -> None:
    receipts = [receipt(n) for n in range(2)] + [receipt(9, side=128)]
    straight = Order(1, fixed(*receipts))
    ids = [straight.next_batch(8) for _ in range(20)]
    first = Order(1, fixed(*receipts))
    for _ in range(stop_after):
        first.next_batch(8)
    second = Order(1, fixed(*receipts), first.cursor)
    assert [second.next_batch(8) for _ in range(20 - stop_after)] == ids[stop_after:]


def test_ranks_may_change_in_the_middle_of_an_epoch() -> None:
    receipts = [receipt(n) for n in range(3)] + [receipt(9, side=128)]
    straight = Order(2, fixed(*receipts))
    expected = [sample.id for _ in range(12) for sample in straight.next_batch(12).samples]
    seen: list[str] = []
    cursor = None
    for world, batches in ((4, 3), (3, 4), (1, 2), (2, 3)):
        orders = [Order(2, fixed(*receipts), cursor) for _ in range(world)]
        for _ in range(batches):
            parts = [order.next_batch(12).for_rank(rank, world) for rank, order in enumerate(orders)]
            seen += [parts[i % world][i // world].id for i in range(12)]
        assert len({str(order.cursor) for order in orders}) == 1
        cursor = orders[0].cursor
    assert seen == expected


def test_held_out_records_never_come() -> None:
    order = Order(0, fixed(receipt(0, held_out=(1, 4)), receipt(1)))
    records = {(s.receipt.item, s.record) for _ in range(30) for s in order.next_batch(6).samples}
    assert order.epoch_length(0) == 8 * 3
    assert {(f"{0:016x}", 1), (f"{0:016x}", 4)}.isdisjoint(records) and len(records) == 8


def test_sizes_interleave_in_proportion() -> None:
    order = Order(0, fixed(receipt(0, records=30), receipt(1, records=10, side=128)))
    sizes = [order.next_batch(6).size for _ in range(80)]
    assert all(0.6 < Counter(sizes[start : start + 20])[64, 64] / 20 < 0.9 for start in range(0, 80, 20))
    batch = order.next_batch(6)
    assert {(s.receipt.height, s.receipt.width) for s in batch.samples} == {batch.size}


def test_a_set_that_grows_joins_at_the_next_epoch() -> None:
    growing = [[receipt(0)], [receipt(0), receipt(1)], [receipt(0), receipt(1), receipt(2, side=128)]]
    order = Order(0, lambda epoch: tuple(growing[min(epoch, 2)]))
    seen = [sample.id for _ in range(15) for sample in order.next_batch(3).samples]
    assert {name.split("/")[0] for name in seen[:15]} == {f"{0:016x}"}
    assert len(set(seen[15:45])) == 30
    sizes = {order.next_batch(3).size for _ in range(40)}
    assert sizes == {(64, 64), (128, 128)}


def test_a_batch_is_the_same_whoever_asks() -> None:
    order, other = (Order(0, fixed(receipt(0), receipt(1))) for _ in range(2))
    assert dataclasses.astuple(order.next_batch(5)) == dataclasses.astuple(other.next_batch(5))


@pytest.mark.parametrize("receipts", [(), (receipt(0, records=2, held_out=(0, 1)),)])
def test_nothing_to_train_on_is_said(receipts: tuple[Receipt, ...]) -> None:
    with pytest.raises(Partial, match="nothing to train on"):
        Order(0, lambda epoch: receipts)
    later = Order(0, lambda epoch: (receipt(0),) if epoch == 0 else receipts)
    with pytest.raises(Partial, match="epoch 1 has nothing"):
        for _ in range(10):
            later.next_batch(4)
