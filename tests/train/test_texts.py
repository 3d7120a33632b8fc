"""Any words, where the encoder is at hand: its rows are the harvest's own; a wrong encoder draws nothing."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import BadUsage, Refused
from common.shards import ShardSet
from tests.made import command
from tests.micro import write_micro_wan
from tests.train.test_export import trained
from train.texts import draw_words, encode


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, micro_set: Path, micro_init: Path) -> Path:
    return trained(tmp_path_factory.mktemp("run"), micro_set, micro_init)


def test_the_rows_are_the_harvests_own(micro_set: Path, micro_wan: Path) -> None:
    shards = ShardSet.open(micro_set)
    receipt = shards.manifest().receipts[0]
    record = shards.read(receipt).record(1)
    (rows,) = encode(micro_wan, [record.prompt], shards.contract)
    np.testing.assert_array_equal(rows, record.text)


def test_words_are_drawn_and_seeds_decide(tmp_path: Path, run: Path, micro_wan: Path) -> None:
    words = ("train", "sample", run, "--text-encoder", micro_wan, "--prompt", "a red cat", "--prompt", "the &amp; sea")
    done = command(*words, "--out", tmp_path / "p.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "p.png") as drawn:
        assert drawn.size == (2 * (64 + 4) + 4, 64 + 8)
    first = draw_words(run, ["a red cat"], micro_wan, seed=0, steps=2)
    assert np.array_equal(first, draw_words(run, [" a red  cat"], micro_wan, seed=0, steps=2))
    assert not np.array_equal(first, draw_words(run, ["a red cat"], micro_wan, seed=1, steps=2))


def test_another_encoder_and_half_a_wish_are_refused(tmp_path: Path, run: Path) -> None:
    other = write_micro_wan(tmp_path / "other", seed=5)
    with pytest.raises(Refused, match="not the one that the set was harvested with"):
        draw_words(run, ["a red cat"], other, seed=0, steps=2)
    with pytest.raises(BadUsage, match="no text encoder"):
        draw_words(run, ["a red cat"], tmp_path, seed=0, steps=2)
    done = command("train", "sample", run, "--prompt", "x", "--out", tmp_path / "p.png")
    assert done.returncode == 2 and "go together" in done.stderr
