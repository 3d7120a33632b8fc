"""Work on whole sets: nothing is lost, nothing is mixed, damage is never copied."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.encoding import INT8
from common.errors import Corrupt, Refused
from common.record import BOTH, GUIDED
from common.shards import MOVED, ShardSet, is_held_out
from harvest.granary.carry import carry
from harvest.granary.compare import compare
from harvest.granary.place import LocalPlace
from harvest.granary.rebuild import rebuild
from harvest.granary.select import Choice, convert, merge, subset
from harvest.granary.verify import require_whole, verify
from tests.made import NUMERICS, command, made_contract, made_record, planned, tree


def a_set(path: Path, numbers: range, *, container: str = "zarr", **contract: object) -> ShardSet:
    meaning = made_contract(**contract)
    shards = ShardSet.create(path, meaning)
    for start in range(numbers.start, numbers.stop, 4):
        batch = [made_record(number, meaning) for number in range(start, min(start + 4, numbers.stop))]
        shards.commit(batch, NUMERICS, container=container)
    return shards


def digests(shards: ShardSet) -> dict[str, str]:
    headers = [shards.read(receipt).header for receipt in shards.manifest().receipts]
    return {key: digest for header in headers for key, digest in zip(header.keys, header.digests, strict=True)}


def hurt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


class TestVerify:
    @pytest.mark.parametrize("container", ["zarr", "tar"])
    def test_missing_torn_and_altered_are_told_apart(self, tmp_path: Path, container: str) -> None:
        shards = a_set(tmp_path / "set", range(12), container=container)
        assert list(verify(shards)) == []
        data = {"zarr": ".zarr/points/0.0.0.0.0.0", "tar": ".tar"}[container]
        paths = [receipt.paths(shards.shards_dir)[data] for receipt in shards.manifest().receipts]
        paths[0].unlink()
        paths[1].write_bytes(paths[1].read_bytes()[:-512])
        hurt(paths[2])
        found = {damage.item: damage for damage in verify(shards)}
        assert [found[path.parts[-3 if container == "zarr" else -1].split("-")[0]].kind for path in paths] == [
            "missing",
            "torn",
            "altered",
        ]
        assert all("record" in str(damage) for damage in found.values())

    def test_the_command_line_says_it_and_exits_5(self, tmp_path: Path) -> None:
        shards = a_set(tmp_path / "set", range(8))
        assert command("harvest", "verify", shards.path).returncode == 0
        hurt(shards.manifest().receipts[1].paths(shards.shards_dir)[".zarr/points/0.0.0.0.0.0"])
        done = command("harvest", "verify", shards.path, "--json")
        (line,) = done.stdout.splitlines()
        assert done.returncode == 5 and "Traceback" not in done.stderr
        assert json.loads(line)["kind"] == "altered" and "record" in json.loads(line)["pieces"][0]

    def test_a_damaged_receipt_is_named(self, tmp_path: Path) -> None:
        shards = a_set(tmp_path / "set", range(4))
        hurt(shards.receipt_path(shards.manifest().receipts[0].item))
        (damage,) = verify(shards)
        assert damage.pieces == ("the receipt",)


class TestRebuild:
    @pytest.mark.parametrize("container", ["zarr", "tar", "zarr+zstd"])
    @pytest.mark.parametrize(("encoding", "branches"), [("float16", BOTH), (INT8, BOTH), (INT8, GUIDED)])
    def test_lost_receipts_come_back_byte_for_byte(
        self, tmp_path: Path, container: str, encoding: str, branches: str
    ) -> None:
        shards = a_set(tmp_path / "set", range(8), container=container, encoding=encoding, branches=branches)
        before = tree(shards.path)
        first, second = shards.manifest().receipts
        shards.receipt_path(first.item).unlink()
        hurt(shards.receipt_path(second.item))
        if container == "tar":
            first.paths(shards.shards_dir)[".idx"].unlink()
        made = list(rebuild(shards))
        assert made == [first, second] and tree(shards.path) == before
        assert list(rebuild(shards)) == []

    @pytest.mark.parametrize("container", ["zarr", "tar"])
    def test_a_shard_keeps_the_name_that_it_has(self, tmp_path: Path, container: str) -> None:
        """Sets are older than the rule by which names are given now."""
        shards = a_set(tmp_path / "set", range(4), container=container)
        (now,) = shards.manifest().receipts
        older = dataclasses.replace(now, stem=f"{now.item}-{now.digest[:8]}")
        for path in shards.shards_dir.iterdir():
            path.rename(path.with_name(path.name.replace(now.stem, older.stem)))
        shards.receipt_path(now.item).unlink()
        assert list(rebuild(shards)) == [older] and shards.manifest().receipts == (older,)
        require_whole(shards, older)

    @pytest.mark.parametrize("container", ["zarr", "tar"])
    def test_a_damaged_shard_gets_no_receipt(self, tmp_path: Path, container: str) -> None:
        shards = a_set(tmp_path / "set", range(4), container=container)
        (receipt,) = shards.manifest().receipts
        shards.receipt_path(receipt.item).unlink()
        hurt(receipt.paths(shards.shards_dir)[{"zarr": ".zarr/final/0.0.0.0", "tar": ".tar"}[container]])
        (fault,) = rebuild(shards)
        assert isinstance(fault, Corrupt) and shards.manifest().num_records == 0


class TestSelect:
    @pytest.mark.parametrize("encoding", ["float16", INT8])
    def test_there_and_back_is_byte_identical(self, tmp_path: Path, encoding: str) -> None:
        shards = a_set(tmp_path / "set", range(10), encoding=encoding)
        tar = convert(shards, tmp_path / "tar", "tar")
        assert digests(tar) == digests(shards)
        archive = convert(tar, tmp_path / "archive", "zarr+zstd")
        assert digests(archive) == digests(shards)
        assert tree(convert(archive, tmp_path / "back", "zarr").path) == tree(shards.path)

    def test_conversion_goes_on_where_it_stopped(self, tmp_path: Path) -> None:
        shards = a_set(tmp_path / "set", range(12))
        convert(shards, tmp_path / "whole", "tar")
        part = convert(shards, tmp_path / "part", "tar")
        gone = part.manifest().receipts[1]
        part.receipt_path(gone.item).unlink()
        convert(shards, tmp_path / "part", "tar")
        assert tree(tmp_path / "part") == tree(tmp_path / "whole")

    def test_damage_is_never_copied(self, tmp_path: Path) -> None:
        shards = a_set(tmp_path / "set", range(8))
        receipt = shards.manifest().receipts[0]
        hurt(receipt.paths(shards.shards_dir)[".zarr/text/0.0"])
        with pytest.raises(Corrupt, match=receipt.item):
            convert(shards, tmp_path / "tar", "tar")

    def test_merge_takes_each_key_once_from_the_first(self, tmp_path: Path) -> None:
        a, b = a_set(tmp_path / "a", range(0, 8)), a_set(tmp_path / "b", range(6, 16))
        both = merge([a, b], tmp_path / "both")
        assert digests(both) == digests(a) | digests(b)
        keys = [key for receipt in both.manifest().receipts for key in both.read(receipt).header.keys]
        assert len(keys) == len(set(keys)) == 16
        before = tree(both.path)
        assert tree(merge([a, b], tmp_path / "both").path) == before

    def test_sets_of_other_contracts_do_not_mix(self, tmp_path: Path) -> None:
        a, b = a_set(tmp_path / "a", range(4)), a_set(tmp_path / "b", range(4), guidance=(5.0, 3.0))
        with pytest.raises(Refused, match="guidance"):
            merge([a, b], tmp_path / "both")
        with pytest.raises(Refused, match="another contract"):
            ShardSet(a.path, b.contract).read(a.manifest().receipts[0])

    def test_subset_by_prompt_and_held_out(self, tmp_path: Path) -> None:
        shards = a_set(tmp_path / "set", range(240))
        some = subset(shards, tmp_path / "some", Choice(prompts=("prompt 1?", "prompt 3")))
        prompts = {prompt for receipt in some.manifest().receipts for prompt in some.read(receipt).header.prompts}
        assert prompts == {"prompt 3", *(f"prompt 1{n}" for n in range(10))}
        assert digests(some).items() <= digests(shards).items()
        parts = [subset(shards, tmp_path / str(flag), Choice(held_out=flag)) for flag in (True, False)]
        assert digests(parts[0]) | digests(parts[1]) == digests(shards)
        held = {p for receipt in parts[0].manifest().receipts for p in parts[0].read(receipt).header.prompts}
        assert held and all(map(is_held_out, held))

    def test_subset_by_noise_level_is_another_meaning(self, tmp_path: Path) -> None:
        shards = a_set(tmp_path / "set", range(12))
        low = subset(shards, tmp_path / "low", Choice(sigmas=(0.0, 0.5)))
        with pytest.raises(Refused, match="source"):
            low.require(shards.contract)
        total = 0
        for receipt in low.manifest().receipts:
            header = low.read(receipt).header
            assert (header.sigmas < 0.5).all()
            total += header.sigmas.size
        wanted = [(made_record(number).sigmas < 0.5).sum() for number in range(12)]
        assert total == sum(wanted) and list(verify(low)) == []

    def test_what_keeps_the_combination_alone_goes_the_same_ways(self, tmp_path: Path) -> None:
        shards = a_set(tmp_path / "set", range(12), branches=GUIDED)
        tar = convert(shards, tmp_path / "tar", "tar")
        archive = convert(tar, tmp_path / "archive", "zarr+zstd")
        assert digests(archive) == digests(shards)
        assert tree(convert(archive, tmp_path / "back", "zarr").path) == tree(shards.path)
        parts = [subset(tar, tmp_path / str(low), Choice(sigmas=(low, low + 0.5))) for low in (0.0, 0.5)]
        held = [reader.record(row) for part in parts for receipt in part.manifest().receipts
                for reader in [part.read(receipt)] for row in range(receipt.num_records)]  # fmt: skip
        assert sum(len(record.sigmas) for record in held) == 24
        assert {record.point_fields for record in held} == {("latents", "guided")}
        other = a_set(tmp_path / "other", range(10, 20), branches=GUIDED)
        assert digests(merge([shards, other], tmp_path / "both")) == digests(shards) | digests(other)
        assert all(list(verify(each)) == [] for each in (tar, archive, *parts))

    def test_compare_tells_what_differs(self, tmp_path: Path) -> None:
        a, b = a_set(tmp_path / "a", range(0, 8)), a_set(tmp_path / "b", range(4, 12))
        assert compare(a, a).none
        difference = compare(a, b)
        assert (len(difference.only_a), len(difference.only_b), difference.num_equal) == (4, 4, 4)
        other = ShardSet.create(tmp_path / "c", a.contract)
        wrong = dataclasses.replace(made_record(0), final=made_record(1).final)
        other.commit([wrong, *(made_record(n) for n in range(1, 4))], NUMERICS)
        assert compare(a, other).altered == (made_record(0).key,)


class TestCarry:
    @pytest.mark.parametrize("container", ["zarr", "tar"])
    def test_a_copy_is_equal_and_goes_on(self, tmp_path: Path, container: str) -> None:
        shards = a_set(tmp_path / "set", range(12), container=container)
        (shards.path / "assets" / "vae").mkdir()
        (shards.path / "assets" / "vae" / "config.json").write_text("{}")
        journey = carry(LocalPlace(shards.path), LocalPlace(tmp_path / "copy"))
        next(journey)
        assert ShardSet.open(tmp_path / "copy").manifest().num_records == 4
        assert len(list(carry(LocalPlace(shards.path), LocalPlace(tmp_path / "copy")))) == 3
        assert tree(tmp_path / "copy") == tree(shards.path)

    def test_what_arrived_torn_is_sent_again(self, tmp_path: Path) -> None:
        shards = a_set(tmp_path / "set", range(4))
        list(carry(LocalPlace(shards.path), LocalPlace(tmp_path / "copy")))
        receipt = shards.manifest().receipts[0]
        (tmp_path / "copy" / "receipts" / f"{receipt.item}.json").unlink()
        hurt(receipt.paths(tmp_path / "copy" / "shards")[".zarr/points/0.0.0.0.0.0"])
        list(carry(LocalPlace(shards.path), LocalPlace(tmp_path / "copy")))
        assert tree(tmp_path / "copy") == tree(shards.path)

    def test_damage_at_the_source_does_not_arrive(self, tmp_path: Path) -> None:
        shards = a_set(tmp_path / "set", range(4))
        hurt(shards.manifest().receipts[0].paths(shards.shards_dir)[".zarr/final/0.0.0.0"])
        with pytest.raises(Corrupt, match="did not arrive"):
            list(carry(LocalPlace(shards.path), LocalPlace(tmp_path / "copy")))
        assert ShardSet.open(tmp_path / "copy").manifest().num_records == 0

    @pytest.mark.parametrize("container", ["zarr", "tar"])
    def test_a_freed_source_still_knows_what_is_done(self, tmp_path: Path, container: str) -> None:
        shards = a_set(tmp_path / "set", range(8), container=container)
        before = digests(shards)
        list(carry(LocalPlace(shards.path), LocalPlace(tmp_path / "copy"), free=True))
        assert digests(ShardSet.open(tmp_path / "copy")) == before
        assert list(shards.shards_dir.iterdir()) == [] and shards.manifest().receipts == ()
        notes = [json.loads(path.read_bytes()) for path in (shards.path / MOVED).iterdir()]
        assert sorted(key for note in notes for key in note["keys"]) == sorted(before)


def test_a_freed_harvest_has_nothing_left_to_do(tmp_path: Path, micro_set: Path, micro_config) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(micro_set, tmp_path / "set")
    list(carry(LocalPlace(tmp_path / "set"), LocalPlace(tmp_path / "away"), free=True))
    assert list(planned(micro_config).remaining(ShardSet.open(tmp_path / "set"))) == []


@pytest.mark.parametrize("words", [("convert", "{a}", "{out}", "--to", "tar"), ("merge", "{a}", "{b}", "{out}"),
                                   ("subset", "{a}", "{out}", "--prompt", "prompt 1"), ("push", "{a}", "{out}"),
                                   ("pull", "{a}", "{out}"), ("rebuild", "{a}")])  # fmt: skip
def test_the_command_line_does_it(tmp_path: Path, words: tuple[str, ...]) -> None:
    names = {
        "a": a_set(tmp_path / "a", range(8)).path,
        "b": a_set(tmp_path / "b", range(8, 12)).path,
        "out": tmp_path / "out",
    }
    done = command("harvest", *(word.format(**names) for word in words))
    assert done.returncode == 0, done.stderr
    assert command("harvest", "verify", names["a" if words[0] == "rebuild" else "out"]).returncode == 0
    np.testing.assert_equal(command("harvest", "diff", names["a"], names["a"]).returncode, 0)
