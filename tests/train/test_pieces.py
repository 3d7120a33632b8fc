"""Whoever fills a slot, in whatever order and however often, it holds the same bytes."""

import itertools
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from common.errors import Corrupt
from common.record import Array
from common.shards import ShardSet
from tests.made import NUMERICS, ROOT, made_contract, made_record
from tests.train.test_data import copied, feed, flip_a_bit, made_set, saying, steps_of
from train.feed.filling import Filler, Options
from train.feed.order import Order
from train.feed.pieces import ALONE, Filled, Piece, Share, finished
from train.feed.slots import Marks, Slot, SlotPlan

BATCH = 7
OPTIONS = Options(text_rows=64, on_corrupt="skip")


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return made_set(tmp_path / "set")


def asked(shards: ShardSet, number: int = 0) -> Slot:
    """A slot with a request, full of noise."""
    receipts = shards.manifest().receipts
    order = Order(0, lambda epoch: receipts)
    for _ in range(number):
        order.next_batch(BATCH)
    plan = SlotPlan(contract=shards.contract, size=(64, 64), num_samples=BATCH, text_rows=64)
    memory = bytearray(np.random.default_rng(number).bytes(plan.num_bytes))
    slot = Slot(plan, memoryview(memory))
    slot.ask_for(order.next_batch(BATCH).samples.rows)
    return slot


def filled(slot: Slot, shards: ShardSet, shares: Sequence[Share]) -> Filled:
    return finished(slot, [Filler(shards, OPTIONS).fill(slot, progress(), share) for share in shares])


def progress() -> Array:
    return np.zeros(1, np.int64)


def held(slot: Slot, told: Filled) -> list[bytes]:
    areas = [*slot.fields.values(), slot.timesteps, slot.sigmas, slot.expert, slot.inverse]
    areas += [slot.lengths[: told.num_texts], slot.text(told.num_texts, told.longest)]
    return [area.tobytes() for area in areas]


@pytest.mark.parametrize("order", [*itertools.permutations(range(3)), (2, 2, 1, 0, 1, 2)], ids=str)
def test_any_order_of_fillers_gives_what_one_alone_gives(shards: ShardSet, order: tuple[int, ...]) -> None:
    for number in range(3):
        alone, together = asked(shards, number), asked(shards, number)
        expected = filled(alone, shards, [ALONE])
        assert filled(together, shards, [Share(reader, 3) for reader in order]) == expected
        assert held(together, expected) == held(alone, expected)


def test_each_text_and_point_is_read_once(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = asked(shards)
    read: list[int] = []
    monkeypatch.setattr("train.feed.filling._read_point", lambda slot, row, sample: read.append(row))
    pieces = [Filler(shards, OPTIONS).fill(slot, progress(), Share(reader, 3)) for reader in (1, 0, 2)]
    assert sorted(read) == list(range(BATCH))
    assert [piece.unfound is None for piece in pieces] == [False, True, True], "the first left no text"


def test_who_takes_the_place_of_a_dead_one_reads_what_that_one_had_taken(shards: ShardSet) -> None:
    alone, together = asked(shards), asked(shards)
    expected = filled(alone, shards, [ALONE])
    for number in range(BATCH):  # taken, and never read
        assert together.points_taken.take(number, 1) and together.texts_taken.take(number, 1)
    assert filled(together, shards, [Share(0, 2), Share(1, 2)]) == expected
    assert held(together, expected) == held(alone, expected)


def test_what_a_dead_one_had_taken_is_read_also_where_its_shard_must_be_opened_again(tmp_path: Path) -> None:
    """Each record in a shard of its own: who takes the dead one's place has none of them open but its own."""
    contract = made_contract()
    shards = ShardSet.create(tmp_path / "set", contract)
    for number in range(12):
        shards.commit([made_record(number, contract, side=64)], NUMERICS, container="zarr")
    alone, together = asked(shards), asked(shards)
    expected = filled(alone, shards, [ALONE])
    for number in range(BATCH):
        assert together.points_taken.take(number, 1)
    for number in range(expected.num_texts):
        assert together.texts_taken.take(number, 1)
    assert filled(together, shards, [Share(0, 2), Share(1, 2)]) == expected
    assert held(together, expected) == held(alone, expected)


def test_what_one_has_taken_no_other_gets(shards: ShardSet) -> None:
    taken = asked(shards).points_taken
    assert taken.take(3, 0) and not taken.take(3, 1) and taken.take(3, 0)
    taken.end_at(5)
    assert not taken.take(5, 0) and taken.some_are_left(1)
    assert [taken.take(number, 1) for number in range(5)] == [True, True, True, False, True]
    assert not taken.some_are_left(2) and taken.some_are_left(1), "its own are read again"


def test_fillers_that_found_different_rows_are_not_believed(shards: ShardSet) -> None:
    """Each of them laid out the texts, and not in the same way."""
    gone = (2, "item x is damaged", "crc32c 1, not 2", "verify the set")
    whole, other = Piece([], [], 3, 8), Piece([gone], [2], 2, 8)
    with pytest.raises(Corrupt, match="item x is damaged"):
        finished(asked(shards), [whole, other])
    assert finished(asked(shards), [other, Piece([gone])]).skipped == [(2, "item x is damaged; found: crc32c 1, not 2")]


def test_a_damaged_text_costs_its_samples_whoever_reads_it(shards: ShardSet) -> None:
    whole = [step.ids for _, step in zip(range(12), feed(shards), strict=False)]
    receipt = shards.manifest().receipts[1]
    reader = shards.read(receipt)
    extents = reader.tables.text  # type: ignore[attr-defined]
    data = bytearray(extents.path.read_bytes())
    data[int(extents.offsets[reader.header.text_starts[1]]) + 3] ^= 1
    extents.path.write_bytes(data)
    bad = [f"{receipt.item}/{record}/" for record, prompt in enumerate(reader.header.prompt_of) if prompt == 1]
    how = {"micro_batch": 6, "on_corrupt": "skip"}
    expected = list(steps_of(shards, 12, **how))
    for workers in (0, 1, 3):
        said: list[str] = []
        with feed(shards, **how, read_workers=workers, say=saying(said)) as source:
            assert [copied(step) for _, step in zip(range(12), source, strict=False)] == expected
            assert source.num_skipped == sum(name.startswith(tuple(bad)) for ids in whole for name in ids) >= 2
        assert len(said) == len(bad) and all("text row" in line for line in said)


@pytest.mark.parametrize("container", ["zarr", "tar"])
def test_a_shard_whose_header_is_damaged_costs_its_samples_whoever_looks(tmp_path: Path, container: str) -> None:
    shards = made_set(tmp_path / "set", container=container)
    receipt = shards.manifest().receipts[1]
    paths = receipt.paths(shards.shards_dir)
    path = next(path for name, path in paths.items() if name.endswith(("/zarr.json", ".idx")))
    path.write_bytes(path.read_bytes().replace(b"a", b"b"))
    how = {"micro_batch": 6, "on_corrupt": "skip"}
    expected = list(steps_of(shards, 12, **how))
    for workers in (1, 3):
        assert list(steps_of(shards, 12, read_workers=workers, **how)) == expected


def test_a_damaged_text_leaves_nothing_of_what_stood_there(shards: ShardSet) -> None:
    slot = asked(shards)
    told = filled(slot, shards, [ALONE])
    before = slot.lengths[: told.num_texts].copy()
    damaged = asked(shards)
    filler = Filler(shards, OPTIONS)
    filler.texts.get = lambda name, reader: (_ for _ in ()).throw(Corrupt(wrong="w", found="f", mend="m"))  # type: ignore[method-assign]
    piece = filler.fill(damaged, progress(), ALONE)
    assert {row for row, *_ in piece.bad} == set(range(BATCH)) and (before > 0).all()
    assert not damaged.lengths[: piece.num_texts].any() and not damaged.text(piece.num_texts, piece.longest).any()


@pytest.mark.parametrize("workers", [2, 5])
def test_a_point_that_many_read_around_is_replaced_by_the_same_one(shards: ShardSet, workers: int) -> None:
    flip_a_bit(shards, 2)
    expected = list(steps_of(shards, 10, on_corrupt="skip", micro_batch=2))
    assert list(steps_of(shards, 10, on_corrupt="skip", micro_batch=2, read_workers=workers)) == expected


OTHERS = """
import mmap, sys
import numpy as np
from train.feed.slots import Marks
taken = Marks(np.frombuffer(mmap.mmap(int(sys.argv[1]), 64), Marks.DTYPE, 32))
print(flush=True)
while True:
    taken.end_at(1)
    taken.clear()
"""


def test_asking_what_is_left_stands_others_who_take_meanwhile() -> None:
    """Another process's stores land between any two of this one's instructions."""
    fd = os.memfd_create("taken")
    os.ftruncate(fd, 64)
    taken = Marks(np.frombuffer(mmap.mmap(fd, 64), Marks.DTYPE, 32))
    words = [sys.executable, "-c", OTHERS, str(fd)]
    with subprocess.Popen(words, cwd=ROOT, pass_fds=(fd,), stdout=subprocess.PIPE) as others:
        assert others.stdout is not None and others.stdout.readline()
        until = time.monotonic() + 0.3
        try:
            while time.monotonic() < until:
                assert taken.some_are_left(0), "the first one is never taken"
        finally:
            others.kill()
            os.close(fd)
