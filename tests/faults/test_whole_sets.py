"""Nothing of a set changes unnoticed, and nothing that mends makes a damage look whole."""

import json
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from common.errors import Corrupt, Fault
from common.manifest import Receipt
from common.shards import ASSETS, CONTRACT_NAME, MOVED, QUARANTINE, RECEIPTS, RUNS, SHARDS, ShardSet
from harvest.granary.carry import carry
from harvest.granary.place import LocalPlace
from harvest.granary.rebuild import rebuild
from harvest.granary.verify import verify, verify_assets, verify_notes
from harvest.quarantine import Note
from tests.granary.test_granary import a_set
from tests.made import NUMERICS, command, made_record, tree

A_NOTE = f"{QUARANTINE}/0123456789abcdef.json"
FAULT = {"key": "", "what": "not finite", "where": "cond[0]"}


def damages(set_dir: Path) -> list[str]:
    """As the command finds them."""
    try:
        shards = ShardSet.open(set_dir)
        return [str(damage) for damage in chain(verify(shards), verify_assets(shards), verify_notes(shards))]
    except Fault as fault:
        return [str(fault)]


def flips(path: Path, count: int) -> Iterator[int]:
    """One bit at a time, each put right again."""
    data = path.read_bytes()
    for where in np.random.default_rng(len(data)).integers(8 * len(data), size=count).tolist():
        hurt = bytearray(data)
        hurt[where // 8] ^= 1 << where % 8
        path.write_bytes(hurt)
        yield where
    path.write_bytes(data)


@pytest.mark.parametrize("per_file", [6, pytest.param(200, marks=pytest.mark.full)])
def test_a_flipped_bit_in_any_file_that_a_reader_needs_is_found(tmp_path: Path, micro_set: Path, per_file: int) -> None:
    out = tmp_path / "set"
    shutil.copytree(micro_set, out, ignore=shutil.ignore_patterns(RUNS))
    (out / RUNS).mkdir()
    assert damages(out) == []
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.relative_to(out).parts[0] for path in files} == {CONTRACT_NAME, RECEIPTS, SHARDS, ASSETS}
    for path in files:
        for where in flips(path, per_file):
            assert damages(out), f"bit {where} of {path.relative_to(out)}"
    assert damages(out) == []


def test_notes_whose_keys_were_altered_are_named(tmp_path: Path) -> None:
    shards = a_set(tmp_path / "set", range(12))
    first, second, _ = shards.manifest().receipts
    keys = list(shards.read(first).header.keys)
    Note(item=first.item, walked=keys, shard=None, faults=[FAULT | {"key": keys[0]}]).write(shards.path)
    list(carry(LocalPlace(shards.path), LocalPlace(tmp_path / "out"), free=True))
    assert damages(shards.path) == []
    for path in (shards.path / QUARANTINE / f"{first.item}.json", shards.path / MOVED / f"{second.item}.json"):
        data = path.read_bytes()
        for key in json.loads(data).get("keys", keys):
            path.write_bytes(data.replace(key[:8].encode(), b"01234567", 1))
            (said,) = damages(shards.path)
            assert path.name in said
        path.write_bytes(data)


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b"3", b'{"walked": 1}', b"\xff\xfe", b"null"])
@pytest.mark.parametrize(
    "where", [CONTRACT_NAME, f"{QUARANTINE}/0123456789abcdef.json", f"{MOVED}/0123456789abcdef.json"]
)
def test_what_is_torn_is_a_fault_that_names_it_and_no_traceback(tmp_path: Path, torn: bytes, where: str) -> None:
    shards = a_set(tmp_path / "set", range(4))
    (shards.path / where).parent.mkdir(exist_ok=True)
    (shards.path / where).write_bytes(torn)
    (said,) = damages(shards.path)
    assert Path(where).name in said


@pytest.mark.parametrize("words", [("verify", "{set}"), ("status", "{set}"), ("push", "{set}", "{out}"),
                                   ("convert", "{set}", "{out}", "--to", "tar")])  # fmt: skip
@pytest.mark.parametrize("where", [CONTRACT_NAME, A_NOTE])
def test_the_commands_say_so_in_one_line(tmp_path: Path, words: tuple[str, ...], where: str) -> None:
    shards = a_set(tmp_path / "set", range(4))
    (shards.path / where).parent.mkdir(exist_ok=True)
    (shards.path / where).write_bytes(b"{")
    done = command("harvest", *(word.format(set=shards.path, out=tmp_path / "out") for word in words))
    assert done.returncode == 5 and Path(where).name in done.stderr + done.stdout
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_receipts_of_another_contract_are_no_whole_set(tmp_path: Path) -> None:
    shards = a_set(tmp_path / "set", range(8))
    text = (shards.path / CONTRACT_NAME).read_text()
    (shards.path / CONTRACT_NAME).write_text(text.replace('"train_steps": 1000', '"train_steps": 1001'))
    (said,) = damages(shards.path)
    assert CONTRACT_NAME in said and "all records of 2 items" in said


def test_a_receipt_under_another_name_counts_nowhere(tmp_path: Path) -> None:
    shards = a_set(tmp_path / "set", range(4))
    (receipt,) = shards.manifest().receipts
    shutil.copy(shards.receipt_path(receipt.item), shards.receipt_path("0" * 16))
    assert shards.manifest().receipts == (receipt,) and shards.manifest().absent == ("0" * 16,)
    (said,) = damages(shards.path)
    assert f"it is that of item {receipt.item}" in said


class TestRebuild:
    """It makes what was lost; it never makes a damage look whole."""

    @pytest.mark.parametrize("container", ["zarr", "tar", "zarr+zstd"])
    @pytest.mark.parametrize("is_lost", [False, True])
    def test_whatever_bit_was_flipped(self, tmp_path: Path, container: str, is_lost: bool) -> None:
        shards = a_set(tmp_path / "set", range(3), container=container)
        (receipt,) = shards.manifest().receipts
        receipt_path, before = shards.receipt_path(receipt.item), tree(shards.path)
        said = receipt_path.read_bytes()
        num_mended = 0
        for path in receipt.paths(shards.shards_dir).values():
            for where in flips(path, 12):
                receipt_path.unlink(missing_ok=True) if is_lost else receipt_path.write_bytes(said)
                (made,) = rebuild(shards)
                if isinstance(made, Receipt):
                    num_mended += 1
                    assert tree(shards.path) == before, f"bit {where} of {path.name}"
                else:
                    assert isinstance(made, Corrupt) and (is_lost or damages(shards.path))
                    assert receipt_path.exists() != is_lost, f"bit {where} of {path.name}"
        assert (num_mended > 0) == (container == "tar")  # its index

    def test_a_new_shard_of_the_item_does_not_take_the_place_of_what_the_receipt_names(self, tmp_path: Path) -> None:
        shards, other = a_set(tmp_path / "set", range(4)), a_set(tmp_path / "other", range(4), container="tar")
        (receipt,) = shards.manifest().receipts
        shutil.rmtree(next(shards.shards_dir.glob("*.zarr")))
        for path in other.shards_dir.iterdir():
            shutil.copy(path, shards.shards_dir)
        (fault,) = rebuild(shards)
        assert isinstance(fault, Corrupt) and Receipt.read(shards.receipt_path(receipt.item)) == receipt
        again = shards.commit([made_record(n) for n in range(4)], NUMERICS)  # what `harvest run` does then
        assert again == receipt and damages(shards.path) == []
