"""What is not whole is said and stops nothing else: in what is made of sets, in receipts made again, in a repair."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import Partial, Refused
from common.shards import ShardSet
from harvest.granary.carry import carry
from harvest.granary.place import LocalPlace
from harvest.granary.rebuild import rebuild
from harvest.granary.repair import repair
from harvest.granary.select import Choice, convert, merge, subset
from harvest.granary.verify import verify
from tests.granary.test_granary import a_set, digests, hurt
from tests.made import command, harvest_config, tree

DATA = ".zarr/points/0.0.0.0.0.0"
MAKERS: dict[str, Callable[[ShardSet, Path], ShardSet]] = {
    "convert": lambda source, out: convert(source, out, "tar"),
    "merge": lambda source, out: merge([source], out),
    "subset": lambda source, out: subset(source, out, Choice(sigmas=(0.0, 1.0))),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_whole_items_are_taken_and_the_others_are_named(tmp_path: Path, maker: str) -> None:
    shards, make = a_set(tmp_path / "set", range(16)), MAKERS[maker]
    before = tree(make(shards, tmp_path / "all").path)
    lost, torn, freed, whole = shards.manifest().receipts
    kept = shards.receipt_path(lost.item).read_bytes()
    hurt(shards.receipt_path(lost.item))
    data = torn.paths(shards.shards_dir)[DATA]
    bytes_of_it = data.read_bytes()
    data.write_bytes(bytes_of_it[:-1])
    with_only(freed.item, shards, tmp_path / "away")
    with pytest.raises(Partial, match="lacks 3 items") as said:
        make(shards, tmp_path / "out")
    assert all(receipt.item in said.value.found for receipt in (lost, torn, freed))
    assert "carried elsewhere" in said.value.found and whole.item not in said.value.found
    assert len(digests(ShardSet.open(tmp_path / "out"))) == 4
    # Mended, the same command goes on.
    shards.receipt_path(lost.item).write_bytes(kept)
    data.write_bytes(bytes_of_it)
    with pytest.raises(Partial, match="lacks 1 items"):
        make(shards, tmp_path / "out")
    list(carry(LocalPlace(tmp_path / "away"), LocalPlace(shards.path)))
    make(shards, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def with_only(item: str, shards: ShardSet, away: Path) -> None:
    """That item carried away and freed, and no other."""
    receipts = {path: path.read_bytes() for path in (shards.path / "receipts").iterdir() if path.stem != item}
    for path in receipts:
        path.unlink()
    list(carry(LocalPlace(shards.path), LocalPlace(away), free=True))
    for path, data in receipts.items():
        path.write_bytes(data)


def test_what_another_source_holds_is_not_missed(tmp_path: Path) -> None:
    """The set that was freed, and the one that it was carried to."""
    a, b = a_set(tmp_path / "a", range(8)), a_set(tmp_path / "b", range(4))
    before = digests(a)
    with_only(a.manifest().receipts[0].item, a, tmp_path / "away")
    hurt(b.receipt_path(b.manifest().receipts[0].item))  # b's only item: whole in a, or in what a was carried to
    assert digests(merge([a, b, ShardSet.open(tmp_path / "away")], tmp_path / "out")) == before
    parts = [a_set(tmp_path / "c", range(3)), a_set(tmp_path / "d", range(3, 8))]  # packed otherwise
    assert digests(merge([*parts, a], tmp_path / "all")) == before


def test_the_command_line_says_it_and_exits_3(tmp_path: Path) -> None:
    shards = a_set(tmp_path / "set", range(8))
    first, second = shards.manifest().receipts
    hurt(shards.receipt_path(first.item))
    done = command("harvest", "convert", shards.path, tmp_path / "out", "--to", "tar")
    assert done.returncode == 3 and first.item in done.stderr and "Traceback" not in done.stderr
    assert set(ShardSet.open(tmp_path / "out").manifest().by_item) == {second.item}


@pytest.mark.parametrize("maker", MAKERS)
def test_what_the_target_holds_is_not_read_again(tmp_path: Path, maker: str) -> None:
    """Seen by damage that nobody meets."""
    shards = a_set(tmp_path / "set", range(12))
    out = MAKERS[maker](shards, tmp_path / "out")
    before = tree(out.path)
    for receipt in shards.manifest().receipts:
        hurt(receipt.paths(shards.shards_dir)[DATA])
    assert tree(MAKERS[maker](shards, tmp_path / "out").path) == before


def test_a_cut_item_is_not_read_again(tmp_path: Path) -> None:
    a, b = a_set(tmp_path / "a", range(0, 8)), a_set(tmp_path / "b", range(6, 12))
    before = tree(merge([a, b], tmp_path / "both").path)
    for receipt in b.manifest().receipts:
        hurt(receipt.paths(b.shards_dir)[DATA])
    assert tree(merge([a, b], tmp_path / "both").path) == before


def test_a_receipt_made_again_names_nothing_that_a_kill_left(tmp_path: Path) -> None:
    shards = a_set(tmp_path / "set", range(4))
    (receipt,) = shards.manifest().receipts
    data = receipt.paths(shards.shards_dir)[DATA]
    (data.parent / f".tmp-1-abcdef-{data.name}").write_bytes(data.read_bytes()[:100])
    shards.receipt_path(receipt.item).unlink()
    assert list(rebuild(shards)) == [receipt] and shards.manifest().receipts == (receipt,)


def test_what_does_not_come_back_stops_the_repair_of_nothing_else(
    tmp_path: Path, micro_set: Path, micro_wan: Path
) -> None:
    """Half of the prompts are in no plan any more: what was asked with them is said, the others are mended."""
    shutil.copytree(micro_set, tmp_path / "set")
    config = harvest_config(tmp_path / "set", micro_wan, prompts={"limit": 6})
    shards = ShardSet.open(config.out)
    for receipt in shards.manifest().receipts:
        hurt(receipt.paths(shards.shards_dir)[DATA])
    mending, said = repair(config, config.out), []
    with pytest.raises(Refused, match="not made by this plan"):
        while True:
            said.append(next(mending))
    assert sum("byte for byte" in line for line in said) == sum("not made by this plan" in line for line in said) == 3
    assert len(list(verify(shards))) == 3
