"""A set carried: never into itself, never over another, never without what must be known of it; killed anywhere."""

import dataclasses
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import common.files
from common.errors import Corrupt, Refused
from common.record import item_id
from common.seals import replace, sealed
from common.shards import ASSETS, MOVED, QUARANTINE, ShardSet
from harvest.__main__ import main
from harvest.config import HarvestConfig
from harvest.granary import told
from harvest.granary.carry import carry
from harvest.granary.place import LocalPlace
from harvest.granary.recompute import recompute
from harvest.granary.repair import repair
from harvest.granary.select import Choice, convert, merge, subset, take
from harvest.granary.verify import verify, verify_assets
from harvest.quarantine import Note, notes_of
from tests.granary.test_granary import a_set, digests, hurt
from tests.harvest.test_repair import bitwise_and_close
from tests.made import NUMERICS, command, harvest_config, harvest_here, made_record, tree

WRITE = common.files._write


def test_what_takes_long_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(told, "EVERY_S", 0.0)
    shards = a_set(tmp_path / "set", range(12))
    names = [str(shards.path), *(str(tmp_path / name) for name in ("copy", "tar", "both", "some"))]
    commands = {"verify": names[:1], "push": names[:2], "convert": [names[0], names[2], "--to", "tar"],
                "merge": [names[0], names[1], names[3]], "subset": [names[0], names[4]]}  # fmt: skip
    for word, options in commands.items():
        with pytest.raises(SystemExit) as caught:
            main([word, *options])
        said = capsys.readouterr().err.splitlines()
        assert caught.value.code == 0 and len(said) == 3, word
        assert all(re.search(rf"{number} of \d shards done=.* left=", line) for number, line in enumerate(said, 1)), (
            said
        )


def carried(source: Path, target: Path, *, free: bool = False) -> Path:
    list(carry(LocalPlace(source), LocalPlace(target), free=free))
    return target


class Killed(Exception):
    pass


class DyingPlace(LocalPlace):
    """A folder whose process dies before the n-th change in it."""

    def __init__(self, root: Path, steps: int) -> None:
        super().__init__(root)
        self.steps = steps

    def write(self, name: str, content: Iterator[bytes]) -> None:
        self._step()
        super().write(name, content)

    def remove(self, name: str) -> None:
        self._step()
        super().remove(name)

    def _step(self) -> None:
        if self.steps == 0:
            raise Killed
        self.steps -= 1


class TestOneFolderUnderTwoNames:
    @pytest.fixture(params=["itself", "linked", "shards linked"])
    def other_name(self, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
        a_set(tmp_path / "set", range(8))
        if request.param == "itself":
            return tmp_path / "set"
        if request.param == "linked":
            (tmp_path / "link").symlink_to(tmp_path / "set")
            return tmp_path / "link"
        carried(tmp_path / "set", tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy" / "shards")
        (tmp_path / "copy" / "shards").symlink_to(tmp_path / "set" / "shards")
        return tmp_path / "copy"

    def test_nothing_is_carried_or_cut_into_it(self, tmp_path: Path, other_name: Path) -> None:
        shards, before = ShardSet.open(tmp_path / "set"), tree(tmp_path / "set")
        other = a_set(tmp_path / "other", range(8, 12))
        for wrong in (
            lambda: carried(shards.path, other_name),
            lambda: carried(shards.path, other_name, free=True),
            lambda: convert(shards, other_name, "tar"),
            lambda: merge([other, shards], other_name),
            lambda: subset(shards, other_name, Choice(prompts=("prompt 1",))),
        ):
            with pytest.raises(Refused, match="shares a folder"):
                wrong()
        assert tree(shards.path) == before

    def test_the_command_line_refuses_it(self, tmp_path: Path) -> None:
        path = a_set(tmp_path / "set", range(4)).path
        before = tree(path)
        done = command("harvest", "push", path, path.parent / "set" / ".." / "set", "--free")
        assert done.returncode == 4 and "Traceback" not in done.stderr and tree(path) == before


class TestWhatStandsAtTheTarget:
    def test_other_records_of_an_item_are_not_replaced(self, tmp_path: Path) -> None:
        shards = a_set(tmp_path / "set", range(8))
        other = ShardSet.create(tmp_path / "out", shards.contract)
        records = [made_record(number) for number in range(4)]
        records[0] = dataclasses.replace(records[0], final=made_record(9).final)
        theirs = other.commit(records, NUMERICS)
        before = tree(other.path)
        for free in (False, True):
            with pytest.raises(Refused, match=f"item {theirs.item} stands"):
                carried(shards.path, other.path, free=free)
            assert before.items() <= tree(other.path).items() and theirs.item in shards.manifest().by_item
        assert shards.manifest().num_records == 4  # the other item arrived, and was freed

    def test_a_repaired_shard_takes_the_place_of_the_one_that_it_supersedes(self, tmp_path: Path) -> None:
        """And the older one that of nothing: carried later, it leaves the newer one."""
        old, new = a_set(tmp_path / "old", range(4)), a_set(tmp_path / "new", range(4))
        (receipt,) = old.manifest().receipts
        records = [made_record(number) for number in range(4)]
        records[0] = dataclasses.replace(records[0], final=made_record(9).final)
        shutil.rmtree(new.path / "receipts")
        shutil.rmtree(new.path / "shards")
        mended = dataclasses.replace(new.commit(records, NUMERICS), supersedes=receipt.digest)
        new.receipt_path(mended.item).write_bytes(mended.to_json())
        carried(old.path, tmp_path / "out")
        carried(new.path, tmp_path / "out")
        assert tree(tmp_path / "out") == tree(new.path)
        carried(old.path, tmp_path / "out", free=True)
        assert tree(tmp_path / "out") == tree(new.path) and old.manifest().num_records == 0

    def test_the_same_records_in_another_container_are_there(self, tmp_path: Path) -> None:
        shards = a_set(tmp_path / "set", range(8))
        tar = convert(shards, tmp_path / "tar", "tar")
        before = tree(tar.path)
        carried(shards.path, tar.path, free=True)
        assert tree(tar.path) == before and shards.manifest().receipts == () and not list(shards.shards_dir.iterdir())

    def test_a_shard_that_was_removed_there_is_sent_again(self, tmp_path: Path) -> None:
        """As `verify` says to do with a damaged one."""
        shards = a_set(tmp_path / "set", range(4))
        carried(shards.path, tmp_path / "out")
        shutil.rmtree(next((tmp_path / "out" / "shards").iterdir()))
        assert tree(carried(shards.path, tmp_path / "out")) == tree(shards.path)


class TestFree:
    @pytest.mark.parametrize("container", ["zarr", "tar"])
    @pytest.mark.parametrize("room", [True, False])
    def test_killed_anywhere_the_same_command_frees_the_rest(
        self, tmp_path: Path, container: str, room: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = a_set(tmp_path / "set", range(4), container=container)
        (receipt,), before = whole.manifest().receipts, digests(whole)
        source, target = tmp_path / "source", tmp_path / "out"
        for steps in range(20):
            for folder in (source, target):
                shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole.path, source)
            if not room:
                fill(source, monkeypatch)
            try:
                list(carry(DyingPlace(source, steps), LocalPlace(target), free=True))
                break
            except Killed:
                assert digests(ShardSet.open(target)) == before and list(verify(ShardSet.open(target))) == []
            carried(source, target, free=True)
            assert sorted(str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()) == [
                "contract.json",
                f"{MOVED}/{receipt.item}.json",
            ]
            assert not list((source / "shards").iterdir()) and digests(ShardSet.open(target)) == before
        assert steps > len(receipt.files)  # one for each file that goes, at least

    def test_what_a_killed_copy_left_in_a_shard_goes_with_it(self, tmp_path: Path) -> None:
        shards = a_set(tmp_path / "set", range(4))
        (data,) = shards.shards_dir.glob("*.zarr/points/0.*")
        left = data.with_name(f".tmp-1-abcdef-{data.name}")
        left.write_bytes(b"a part")
        os.utime(left, (0, 0))
        carried(shards.path, tmp_path / "out", free=True)
        assert not list(shards.shards_dir.iterdir())

    def test_another_fault_of_the_disk_removes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shards = a_set(tmp_path / "set", range(4))
        before = tree(shards.path)
        fill(shards.path, monkeypatch, errno.EIO)
        with pytest.raises(OSError):
            carried(shards.path, tmp_path / "out", free=True)
        assert tree(shards.path) == before


def fill(folder: Path, monkeypatch: pytest.MonkeyPatch, what: int = errno.ENOSPC) -> None:
    """The disk below `folder` is as full as it is now; elsewhere there is room."""
    limit = used(folder)

    def checked(fd: int, data: common.files.Bytes) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink().is_relative_to(folder) and used(folder) + len(data) > limit:
            raise OSError(what, "as full as it gets")
        return WRITE(fd, data)

    monkeypatch.setattr(common.files, "_write", checked)


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class TestNotes:
    @pytest.fixture
    def cut(self, tmp_path: Path, micro_set: Path) -> Path:
        """A set whose first shard lacks its first record, which had been set aside."""
        shutil.copytree(micro_set, tmp_path / "cut")
        shards = ShardSet.open(tmp_path / "cut")
        receipt = shards.manifest().receipts[0]
        packed = shards.read(receipt).packed()
        shards.receipt_path(receipt.item).unlink()
        shutil.rmtree(shards.shards_dir / f"{receipt.stem}.zarr")
        shards.commit_packed(take(packed, [1, 2, 3], shards.contract), "zarr")  # type: ignore[arg-type]
        keys = list(packed.header.keys)
        fault = {"key": keys[0], "what": "not finite", "where": "cond[0]"}
        Note(item=receipt.item, walked=keys, shard=item_id(keys[1:]), faults=[fault]).write(shards.path)
        return shards.path

    @pytest.fixture
    def config(self, tmp_path: Path, micro_wan: Path, micro_config: HarvestConfig) -> HarvestConfig:
        return harvest_config(tmp_path / "any", micro_wan, prompts={"file": micro_config.prompts.file})

    def test_what_was_walked_together_is_known_where_a_set_arrives(
        self, tmp_path: Path, cut: Path, config: HarvestConfig
    ) -> None:
        pushed = carried(cut, tmp_path / "out")
        assert tree(pushed) == tree(cut)
        assert bitwise_and_close(*recompute(config, pushed, 1.0)) == (23, 0)
        tar = convert(ShardSet.open(cut), tmp_path / "tar", "tar")
        assert bitwise_and_close(*recompute(config, tar.path, 1.0)) == (23, 0)

    def test_where_nothing_says_it_no_hardware_is_accused(self, cut: Path, config: HarvestConfig) -> None:
        shutil.rmtree(cut / QUARANTINE)
        bitwise, close = bitwise_and_close(*recompute(config, cut, 1.0))
        assert bitwise >= 20 and close > 0 and bitwise + close == 23
        shards = ShardSet.open(cut)
        (part,) = [receipt for receipt in shards.manifest().receipts if receipt.num_records == 3]
        hurt(part.paths(shards.shards_dir)[".zarr/points/0.0.0.0.0.0"])
        (said,) = repair(config, cut)
        assert "nothing says what was walked" in said and "EQUAL NUMERICS" not in said

    def test_nor_where_a_set_was_cut(self, tmp_path: Path, micro_set: Path, config: HarvestConfig) -> None:
        dogs = subset(ShardSet.open(micro_set), tmp_path / "dogs", Choice(prompts=("*dog",)))
        bitwise, close = bitwise_and_close(*recompute(config, dogs.path, 1.0))
        assert bitwise + close == 6 and close > 0

    def test_what_is_far_away_is_found_all_the_same(self, cut: Path, config: HarvestConfig) -> None:
        shutil.rmtree(cut / QUARANTINE)
        shards = ShardSet.open(cut)
        (part,) = [receipt for receipt in shards.manifest().receipts if receipt.num_records == 3]
        reader = shards.read(part)
        records = [reader.record(row) for row in range(3)]
        records[1] = dataclasses.replace(records[1], final=-records[1].final)
        shards.receipt_path(part.item).unlink()
        shutil.rmtree(shards.shards_dir / f"{part.stem}.zarr")
        shards.commit(records, part.numerics)
        with pytest.raises(Corrupt, match="1 of 23 records do not come back"):
            list(recompute(config, cut, 1.0))

    def test_what_was_mended_in_either_place_is_mended(self, tmp_path: Path) -> None:
        a, b = a_set(tmp_path / "a", range(4)), a_set(tmp_path / "b", range(4))
        (receipt,) = a.manifest().receipts
        faults = [{"key": key, "what": "not finite", "where": "cond[0]"} for key in ("k1", "k2", "k3")]
        walked = ["k1", "k2", "k3"]
        note = Note(item=item_id(walked), walked=walked, shard=receipt.item, faults=faults)
        dataclasses.replace(note, faults=faults[:2]).write(a.path)
        dataclasses.replace(note, faults=faults[1:]).write(b.path)
        carried(a.path, b.path)
        assert notes_of(b.path) == [dataclasses.replace(note, faults=faults[1:2])]
        dataclasses.replace(note, shard="another").write(a.path)
        with pytest.raises(Refused, match="walked twice"):
            carried(a.path, b.path)
        dataclasses.replace(note, shard="never committed").write(b.path)  # so it is the note of no walk that counts
        carried(a.path, b.path)
        assert notes_of(b.path) == notes_of(a.path)


class TestOneBadItem:
    """It is named at the end; the night's copy of all others is not lost over it."""

    @pytest.mark.parametrize("free", [False, True])
    def test_the_others_arrive(self, tmp_path: Path, free: bool) -> None:
        shards = a_set(tmp_path / "set", range(20))
        first, second, *others = shards.manifest().receipts
        hurt(shards.receipt_path(first.item))
        hurt(second.paths(shards.shards_dir)[".zarr/final/0.0.0.0"])
        with pytest.raises(Corrupt, match=rf"{first.item}\.json is damaged, and 1 other item"):
            carried(shards.path, tmp_path / "out", free=free)
        assert ShardSet.open(tmp_path / "out").manifest().receipts == tuple(others)
        assert list(verify(ShardSet.open(tmp_path / "out"))) == []
        left = {first.item, second.item} if free else {receipt.item for receipt in (first, second, *others)}
        assert {path.stem for path in (shards.path / "receipts").iterdir()} == left

    def test_what_went_elsewhere_before_is_said(self, tmp_path: Path) -> None:
        shards = a_set(tmp_path / "set", range(4))
        carried(shards.path, tmp_path / "first", free=True)
        shards.commit([made_record(n) for n in range(4, 8)], NUMERICS)
        done = command("harvest", "push", shards.path, tmp_path / "second")
        assert done.returncode == 0 and "1 items of" in done.stdout and "carried elsewhere before" in done.stdout
        again = command("harvest", "push", shards.path, tmp_path / "first")
        assert again.returncode == 0 and "carried elsewhere" not in again.stdout


class TestAssets:
    def test_what_a_kill_left_is_not_carried(self, tmp_path: Path) -> None:
        shards = a_set(tmp_path / "set", range(4))
        before = tree(shards.path)
        (shards.path / ASSETS / ".tmp-1-vae").mkdir()
        (shards.path / ASSETS / ".tmp-1-vae" / "config.json").write_text("{")
        assert tree(carried(shards.path, tmp_path / "out")) == before

    def test_a_damaged_one_does_not_arrive(self, tmp_path: Path, micro_set: Path) -> None:
        source = shutil.copytree(micro_set, tmp_path / "set")
        hurt(source / ASSETS / "negative.npy")
        with pytest.raises(Corrupt, match="did not arrive"):
            carried(source, tmp_path / "out")

    def test_a_damaged_one_at_the_target_is_sent_again_and_a_sound_one_stays(
        self, tmp_path: Path, micro_set: Path
    ) -> None:
        out = carried(micro_set, tmp_path / "out")
        hurt(out / ASSETS / "negative.npy")
        replace(out / ASSETS, "scheduler.json", b"{}")
        carried(micro_set, out)
        assert (out / ASSETS / "negative.npy").read_bytes() == (micro_set / ASSETS / "negative.npy").read_bytes()
        assert (out / ASSETS / "scheduler.json").read_bytes() == b"{}"
        assert list(verify_assets(ShardSet.open(out))) == []

    def test_what_stands_there_without_a_seal_is_not_replaced(self, tmp_path: Path, micro_set: Path) -> None:
        """Nobody knows that it is damaged; what is the same gets its seal."""
        out = carried(micro_set, tmp_path / "out")
        shutil.rmtree(out / ASSETS / "seals")
        (out / ASSETS / "scheduler.json").write_bytes(b"{}")
        carried(micro_set, out)
        assert (out / ASSETS / "scheduler.json").read_bytes() == b"{}"
        assert "scheduler.json" not in sealed(out / ASSETS)
        assert {*sealed(out / ASSETS), "scheduler.json"} == {*sealed(micro_set / ASSETS)}

    def test_a_vae_that_came_in_part_is_completed_by_a_run(
        self, tmp_path: Path, micro_set: Path, micro_wan: Path, micro_config: HarvestConfig
    ) -> None:
        out = tmp_path / "out"
        steps = 0
        while not list(out.glob("assets/vae/*")):
            shutil.rmtree(out, ignore_errors=True)
            with pytest.raises(Killed):
                list(carry(LocalPlace(micro_set), DyingPlace(out, steps := steps + 1)))
        assert len(list(out.glob("assets/vae/*"))) < len(list(micro_set.glob("assets/vae/*")))
        harvest_here(harvest_config(out, micro_wan, prompts={"file": micro_config.prompts.file}))
        vae = tree(micro_set / ASSETS / "vae")
        assert len(vae) > 1 and tree(out / ASSETS / "vae") == vae
