"""From extents to tensors: the values of the records, whoever reads them and in whatever order."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.encoding import INT8
from common.errors import BadUsage, Corrupt, Partial
from common.manifest import Receipt
from common.record import BOTH, GUIDED
from common.shards import ShardSet
from tests.made import NUMERICS, made_contract, made_record
from train.feed import filling
from train.feed.data import MOST_AHEAD, Feed, Step, accumulation
from train.feed.order import Order
from train.feed.reading import ThreadReader

WORKERS = [0, 1, 2]


def made_set(path: Path, *, container: str = "zarr", sides: tuple[int, ...] = (64,), **contract: Any) -> ShardSet:
    """Three shards of four records of two points, per size."""
    meaning = made_contract(**contract)
    shards = ShardSet.create(path, meaning)
    for number, side in enumerate(sides):
        for start in range(100 * number, 100 * number + 12, 4):
            records = [made_record(n, meaning, side=side) for n in range(start, start + 4)]
            shards.commit(records, NUMERICS, container=container)
    return shards


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return made_set(tmp_path / "set")


def feed(shards: ShardSet, **changes: Any) -> Feed:
    receipts = shards.manifest().receipts
    order = Order(0, lambda epoch: receipts)
    values = {"global_batch": 6, "micro_batch": 3, "rank": 0, "world": 1, "deadline_s": 20.0} | changes
    return Feed(shards, order, **values)


def copied(step: Step) -> list[bytes | str]:
    """Everything that a step says, out of the memory that will be used again."""
    tensors = [tensor for micro in step.micros for tensor in micro.tensors().values()]
    shapes = [f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors]
    return [*(tensor.numpy().tobytes() for tensor in tensors), *shapes, *step.ids, str(step.cursor), str(step.epoch)]


def steps_of(shards: ShardSet, count: int, **changes: Any) -> Iterator[list[bytes | str]]:
    with feed(shards, **changes) as source:
        for _, step in zip(range(count), source, strict=False):
            yield copied(step)


def flip_a_bit(shards: ShardSet, number: int, *, record: int = 1, point: int = 1) -> str:
    """In one point of one shard; the record's key."""
    receipt = shards.manifest().receipts[number]
    reader = shards.read(receipt)
    extents = reader.tables.points  # type: ignore[attr-defined]
    data = bytearray(extents.path.read_bytes())
    data[int(extents.offsets[record * receipt.num_points + point]) + 5] ^= 4
    extents.path.write_bytes(data)
    return reader.header.keys[record]


@pytest.mark.parametrize("branches", [BOTH, GUIDED])
@pytest.mark.parametrize("workers", WORKERS)
def test_batches_hold_the_records_own_values(tmp_path: Path, workers: int, branches: str) -> None:
    shards = made_set(tmp_path / "set", branches=branches)
    by_item = shards.manifest().by_item
    with feed(shards, read_workers=workers) as source:
        for _, step in zip(range(9), source, strict=False):
            assert len(step.micros) == 2 and len(step.ids) == 6
            for number, name in enumerate(step.ids):
                item, index, point = name.split("/")
                record, k = shards.read(by_item[item]).record(int(index)), int(point)
                micro, row = step.micros[number // 3], number % 3
                for field in shards.contract.point_fields:
                    np.testing.assert_array_equal(getattr(micro, field)[row].numpy(), getattr(record, field)[k])
                assert len(micro.tensors()) == 6 + len(record.point_fields)
                assert micro.timesteps[row] == record.timesteps[k] and micro.expert[row] == record.expert[k]
                text, length = micro.text[micro.inverse[row]], int(micro.lengths[micro.inverse[row]])
                np.testing.assert_array_equal(text[:length].numpy(), record.text)
                assert not text[length:].any()


@pytest.mark.parametrize(
    "kind",
    [
        {"container": "zarr"},
        {"container": "tar"},
        {"encoding": INT8},
        {"encoding": "float32", "sides": (64, 96)},
        {"branches": GUIDED, "container": "tar"},
        {"branches": GUIDED, "encoding": INT8},
    ],
    ids=str,
)
def test_processes_give_what_a_thread_gives(tmp_path: Path, kind: dict[str, Any]) -> None:
    shards = made_set(tmp_path / "set", **{"sides": (64, 128)} | kind)
    alone = list(steps_of(shards, 14))
    num_tensors = 6 + len(shards.contract.point_fields)
    assert len({step[num_tensors * 2] for step in alone}) >= 2, "both sizes came"
    for workers in (1, 2):
        assert list(steps_of(shards, 14, read_workers=workers)) == alone


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("container", ["zarr", "tar"])
def test_the_library_reads_what_the_offsets_read(tmp_path: Path, container: str, workers: int) -> None:
    fast = made_set(tmp_path / "set", container=container)
    slow = ShardSet.open(fast.path, library=True)
    assert list(steps_of(slow, 5, read_workers=workers)) == list(steps_of(fast, 5))


def test_a_decoded_point_is_what_the_record_says(tmp_path: Path) -> None:
    shards = made_set(tmp_path / "set", encoding=INT8)
    with feed(shards, micro_batch=6) as source:
        step = next(iter(source))
        for row, name in enumerate(step.ids):
            item, index, point = name.split("/")
            record = shards.read(shards.manifest().by_item[item]).record(int(index))
            for field in ("latents", "cond", "uncond"):
                found = getattr(step.micros[0], field)[row].numpy()
                np.testing.assert_array_equal(found, getattr(record, field)[int(point)])
                assert found.dtype == getattr(record, field).dtype


def test_a_text_comes_once_a_batch(shards: ShardSet) -> None:
    with feed(shards, micro_batch=6) as source:
        (micro,) = next(iter(source)).micros
        assert len(micro.text) == len({tuple(row.flatten().tolist()) for row in micro.text})
        assert micro.inverse.dtype == torch.int64 and len(micro.inverse) == 6


def test_ranks_take_their_strides(shards: ShardSet) -> None:
    with feed(shards, micro_batch=6) as source:
        alone = next(iter(source))
        for rank in range(2):
            with feed(shards, micro_batch=3, rank=rank, world=2) as part_source:
                part = next(iter(part_source))
                assert part.ids == alone.ids
                torch.testing.assert_close(part.micros[0].cond, alone.micros[0].cond[rank::2], rtol=0, atol=0)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_step_is_left_alone_until_the_next_is_asked_for(shards: ShardSet, workers: int) -> None:
    expected = list(steps_of(shards, 20))
    with feed(shards, read_workers=workers) as source:
        places = []
        for number, step in zip(range(20), source, strict=False):
            time.sleep(0.02 if number < 5 else 0)  # what is read ahead has been read by now
            assert copied(step) == expected[number]
            places.append(step.micros[0].latents.data_ptr())
        assert 2 <= len(set(places)) <= MOST_AHEAD + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_that_is_slow_finds_more_steps_ready(shards: ShardSet, workers: int) -> None:
    with feed(shards, read_workers=workers) as source:
        for number, _ in zip(range(12), source, strict=False):
            time.sleep(0.05 if number else 0.5)  # the first ones wait for processes to start
        assert len(source._ahead) == MOST_AHEAD


def test_a_new_epoch_is_asked_for_at_the_same_step_however_far_a_rank_looks_ahead(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 freezes it while the others wait: one that asked earlier would wait for a rank that waits for it."""
    receipts = shards.manifest().receipts

    def asked_at(loop_s: float, read_s: float) -> tuple[list[tuple[int, int]], int]:
        asked: list[tuple[int, int]] = []
        taken, most = 0, 0

        def freeze(epoch: int) -> tuple[Receipt, ...]:
            asked.append((epoch, taken))
            return receipts

        with monkeypatch.context() as slowed:
            read = filling._read_point
            slowed.setattr(filling, "_read_point", lambda *words: (time.sleep(read_s), read(*words)))
            with Feed(shards, Order(0, freeze), global_batch=6, micro_batch=3, rank=0, world=1) as source:
                for _, _step in zip(range(15), source, strict=False):
                    taken, most = taken + 1, max(most, len(source._ahead))
                    time.sleep(loop_s)
        return asked, most

    slow, fast = asked_at(0.03, 0.0), asked_at(0.0, 0.003)
    assert slow[1] == MOST_AHEAD and fast[1] == 1, "they looked ahead as far as they could, and as little"
    assert slow[0] == fast[0] and len(slow[0]) >= 3


def test_a_loop_that_waits_for_its_data_uses_two_slots(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    read = filling._read_point
    monkeypatch.setattr(filling, "_read_point", lambda *words: (time.sleep(0.003), read(*words)))
    with feed(shards) as source:
        places = [step.micros[0].latents.data_ptr() for _, step in zip(range(12), source, strict=False)]
    assert len(set(places)) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_bit_stops_the_feed_and_names_item_and_record(shards: ShardSet, workers: int) -> None:
    key = flip_a_bit(shards, 1)
    with pytest.raises(Corrupt, match=rf"item {shards.manifest().receipts[1].item}, record {key}, point 1") as stopped:
        list(steps_of(shards, 12, read_workers=workers))
    assert stopped.value.exit_code == 5


@pytest.mark.parametrize("container", ["zarr", "tar"])
def test_what_is_skipped_is_replaced_counted_and_said_once(tmp_path: Path, container: str) -> None:
    shards = made_set(tmp_path / "set", container=container)
    whole = [step.ids for _, step in zip(range(12), feed(shards), strict=False)]
    key = flip_a_bit(shards, 1)
    bad = f"{shards.manifest().receipts[1].item}/1/1"
    expected = list(steps_of(shards, 12, on_corrupt="skip"))
    for workers in (0, 2):
        said: list[str] = []
        with feed(shards, on_corrupt="skip", read_workers=workers, say=saying(said)) as source:
            for number, step in zip(range(12), source, strict=False):
                assert step.ids == whole[number] and copied(step) == expected[number]
                if bad in step.ids:
                    row = step.ids.index(bad)
                    micro, other = step.micros[row // 3], row // 3 * 3 + (row + 1) % 3
                    assert torch.equal(micro.cond[row % 3], micro.cond[other % 3])
                    assert micro.timesteps[row % 3] == micro.timesteps[other % 3]
            assert source.num_skipped == sum(ids.count(bad) for ids in whole) >= 2
        assert len(said) == 1 and bad in said[0] and key in said[0]


def test_a_micro_batch_without_a_good_sample_stops_all_the_same(shards: ShardSet) -> None:
    for receipt in shards.manifest().receipts:
        for path in receipt.paths(shards.shards_dir).values():
            path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(Corrupt, match="item"):
        next(steps_of(shards, 1, on_corrupt="skip"))


@pytest.mark.parametrize("workers", [0, 1])
def test_longer_texts_are_cut_counted_and_said_once(shards: ShardSet, workers: int) -> None:
    said: list[str] = []
    whole = feed(shards, micro_batch=6)
    with feed(shards, micro_batch=6, text_max_length=4, read_workers=workers, say=saying(said)) as source, whole:
        num_cut = 0
        for _, step, full in zip(range(8), source, whole, strict=False):
            (cut,), (micro,) = step.micros, full.micros
            assert torch.equal(cut.lengths, micro.lengths.clamp(max=4)) and cut.text.shape[1] <= 4
            assert torch.equal(cut.text, micro.text[:, : cut.text.shape[1]])
            num_cut += int((micro.lengths[micro.inverse] > 4).sum())
        assert source.num_cut == num_cut > 0
    assert len(said) == 1 and "rows=4" in said[0]


def test_a_set_that_vanishes_is_a_fault_that_names_the_item(shards: ShardSet) -> None:
    with feed(shards) as source:
        for path in sorted(shards.shards_dir.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        with pytest.raises((Corrupt, Partial), match="item"):
            next(iter(source))


def test_a_thread_that_stalls_meets_the_deadline(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThreadReader, "submit", lambda self, part: None)
    with feed(shards, deadline_s=0.3) as source, pytest.raises(Partial, match="reading thread has not filled batch 0"):
        next(iter(source))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_is_allocated_once_it_is_warm(tmp_path: Path, workers: int) -> None:
    import tracemalloc

    shards = made_set(tmp_path / "set", sides=(512,))
    batch_bytes = 6 * 3 * 4 * 64 * 64 * 2
    with feed(shards, read_workers=workers) as source:
        steps = iter(source)
        for _ in range(12):
            next(steps)
        tracemalloc.start()
        for _ in range(30):
            next(steps)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < batch_bytes / 5


def test_a_global_batch_that_does_not_divide_names_the_nearest() -> None:
    assert accumulation(96, 16, 3) == 2
    with pytest.raises(BadUsage, match="set global_batch to 96 or 144"):
        accumulation(100, 16, 3)


def saying(lines: list[str]) -> Any:
    return lambda event, **facts: lines.append(" ".join([event, *(f"{key}={value}" for key, value in facts.items())]))
