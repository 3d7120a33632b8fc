"""The bench measures readers of the same values: what each gives back is compared with what it was given."""

from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.bench.costs import allocated_per_step, open_many
from tests.bench.report import goals, made_points, make_readers, ours
from tests.bench.rounds import BATCH, measure, table
from tests.bench.store import FeedReader
from tests.bench.training import beside_memory, checkpointing

# webdataset leaves its tar files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
NUM_POINTS = 6 * BATCH
"""More than one shard, whose last one is not full."""


def test_every_reader_gives_back_what_it_was_given_once_each(tmp_path: Path) -> None:
    points = made_points(NUM_POINTS, (3, 4, 8, 8))
    readers, _ = make_readers(tmp_path)
    assert {"raw preadv", "ours, zarr", "ours, tar"} <= {reader.name for reader in readers}
    for reader in readers:
        reader.write(points)
        reader.open()
        seen = []
        for numbers, values in reader.epoch(np.random.default_rng(1).permutation(NUM_POINTS)):
            numbers = reader.numbers() if isinstance(reader, FeedReader) else numbers
            torch.testing.assert_close(values, torch.from_numpy(points[numbers]), rtol=0, atol=0, msg=reader.name)
            seen += numbers.tolist()
        reader.close()
        if isinstance(reader, FeedReader):  # several epochs, without held-out records
            assert len(seen) > 3 * len(set(seen)) > 3 * 0.8 * NUM_POINTS
        else:
            assert sorted(seen) == list(range(NUM_POINTS)), reader.name


def test_the_table_names_every_reader_and_the_goals_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.bench.rounds.ENOUGH_S", 0.0)
    points = made_points(NUM_POINTS, (3, 4, 8, 8))
    readers, absent = make_readers(tmp_path / "store")
    for reader in readers:
        reader.write(points)
    rounds = measure(readers, copy(readers[0]), NUM_POINTS, num_rounds=1, dropped=tmp_path)
    text = "\n".join(table(rounds, points[0].nbytes))
    assert all(reader.name in text for reader in readers)
    assert not any(name in text for name in absent)
    opened = open_many(tmp_path / "many", 20)
    allocated = {reader.name: allocated_per_step(reader, NUM_POINTS) for reader in ours(readers)}
    rings = [reader for reader in readers if isinstance(reader, FeedReader) and reader.num_workers]
    lines = goals(rounds, opened, allocated, rings)
    assert all(line.startswith(("holds ", "MISSES ")) for line in lines)
    for words in (
        "ours, zarr: share of raw",
        "ours, tar: share of raw",
        "ring of 2: ours, tar",
        "webdataset",
        "20 receipts open, peak",
    ):
        assert any(words in line for line in lines), words


def test_a_training_is_measured_beside_itself_fed_from_memory(
    tmp_path: Path, micro_set: Path, micro_init: Path
) -> None:
    lines = list(beside_memory(tmp_path / "run", micro_set, micro_init, steps=40, rounds=1))
    assert "40 steps of 32" in lines[0]
    assert all(line.startswith(("holds ", "MISSES ")) for line in lines[1:3]) and "1 rounds" in lines[2]
    assert "resident bytes" in lines[3]


def test_a_steps_memory_is_what_its_pictures_size_makes_it(micro_set: Path, micro_init: Path) -> None:
    header, rule, *rows = checkpointing(micro_init, micro_set, (512,))
    assert header.count("|") == rule.count("|") == rows[0].count("|")
    kept, again = ([bytes_of(row.split("|")[column]) for column in (4, 5)] for row in rows)
    assert again[0] < kept[0], "measured: computed again, not kept"
    assert again[1] < 0.6 * kept[1], "as planned"


def bytes_of(told: str) -> float:
    number, unit = told.split()
    return float(number) * {"kB": 1e3, "MB": 1e6}[unit]
