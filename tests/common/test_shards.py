"""The granary: what goes in comes out bit for bit, and nothing that was damaged comes out at all."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import shards as shards_module
from common.errors import Corrupt, Refused
from common.files import TEMPORARY_PREFIX, sweep, write_atomic
from common.manifest import MAX_RECEIPT_BYTES, Receipt
from common.record import BOTH, GUIDED, Contract, Record
from common.shard_reader import check_records
from common.shards import ShardSet, is_held_out
from tests.common.contract_of_containers import ContainerContract
from tests.made import NUMERICS, made_contract, made_record, tree


def committed(path: Path, records: list[Record], contract: Contract | None = None) -> tuple[ShardSet, Receipt]:
    shards = ShardSet.create(path, contract or made_contract())
    return shards, shards.commit(records, NUMERICS)


class TestZarr(ContainerContract):
    container = "zarr"

    def stock_values(self, stem: Path) -> list[dict[str, Any]]:
        import zarr

        group: Any = zarr.open_group(f"{stem}.zarr", mode="r")
        return zarr_values(group.attrs["shard"], group["points"][...], group["final"][...], group["text"][...])


class TestTar(ContainerContract):
    container = "tar"

    def stock_values(self, stem: Path) -> list[dict[str, Any]]:
        import webdataset

        values, texts = [], {}
        for sample in webdataset.WebDataset(f"{stem}.tar", shardshuffle=False).decode():
            if "text.npy" in sample:
                texts[sample["__key__"]] = sample["text.npy"]
                continue
            values.append({"key": sample["__key__"], "points": sample["points.npy"], "final": sample["final.npy"],
                           "text": texts[sample["json"]["text"]]})  # fmt: skip
        return values


def zarr_values(header: dict[str, Any], points: Any, final: Any, text: Any) -> list[dict[str, Any]]:
    starts = np.concatenate([[0], np.cumsum(header["text_lengths"])])
    return [
        {"key": key, "points": points[i], "final": final[i], "text": text[starts[prompt] : starts[prompt + 1]]}
        for i, (key, prompt) in enumerate(zip(header["keys"], header["prompt_of"], strict=True))
    ]  # fmt: skip


class TestZarrOfGuided(TestZarr):
    branches = GUIDED


class TestTarOfGuided(TestTar):
    branches = GUIDED


class TestTensorstore(TestZarr):
    """The same shard through another implementation of Zarr v3, where it is installed (`pip install tensorstore`)."""

    def stock_values(self, stem: Path) -> list[dict[str, Any]]:
        tensorstore = pytest.importorskip("tensorstore")

        def read(name: str) -> Any:
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{stem}.zarr/{name}"}}
            return tensorstore.open(spec).result().read().result()

        header = json.loads(Path(f"{stem}.zarr/zarr.json").read_bytes())["attributes"]["shard"]
        return zarr_values(header, read("points"), read("final"), read("text"))


@pytest.mark.parametrize("branches", [BOTH, GUIDED])
@pytest.mark.parametrize("container", ["zarr+zstd", "zarr+pcodec"])
def test_an_archive_is_smaller_and_reads_the_same(tmp_path: Path, container: str, branches: str) -> None:
    contract = made_contract(branches=branches)
    records = [made_record(number, contract, side=256) for number in range(4)]
    shards = ShardSet.create(tmp_path / "set", contract)
    receipt = shards.commit(records, NUMERICS, container=container)
    reader = shards.read(receipt)
    check_records(reader)
    assert [reader.record(i).digest() for i in range(4)] == [record.digest() for record in records]
    plain, _ = committed(tmp_path / "plain", records, contract)
    assert receipt.num_bytes < plain.manifest().num_bytes


class TestCommit:
    def test_a_receipt_is_small_and_closed_by_its_digest(self, tmp_path: Path) -> None:
        shards, receipt = committed(tmp_path / "set", [made_record(number) for number in range(40)])
        path = shards.path / "receipts" / f"{receipt.item}.json"
        assert path.stat().st_size <= MAX_RECEIPT_BYTES
        path.write_bytes(path.read_bytes().replace(b'"num_records": 40', b'"num_records": 41'))
        with pytest.raises(Corrupt, match="its own digest"):
            Receipt.read(path)
        assert shards.manifest().absent == (receipt.item,)
        shards.commit([made_record(number) for number in range(40)], NUMERICS)
        assert shards.manifest().receipts == (receipt,)

    def test_who_commits_first_has_committed(self, tmp_path: Path) -> None:
        shards, first = committed(tmp_path / "set", [made_record(number) for number in range(3)])
        before = tree(shards.path)
        again = shards.commit([made_record(number) for number in range(3)], dataclasses.replace(NUMERICS, threads=9))
        assert again == first and tree(shards.path) == before

    def test_of_two_at_once_the_first_receipt_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Of other numerics, between our shard and our receipt."""
        records, other = [made_record(number) for number in range(3)], dataclasses.replace(NUMERICS, threads=9)
        shards, real, theirs = ShardSet.create(tmp_path / "set", made_contract()), ShardSet.place, list[Receipt]()

        def place(mine: ShardSet, receipt: Receipt, files: dict[str, bytes]) -> None:
            real(mine, receipt, files)
            if not theirs:
                theirs.append(receipt)
                theirs[0] = shards.commit(records, other)

        monkeypatch.setattr(ShardSet, "place", place)
        assert shards.commit(records, NUMERICS) == theirs[0] and theirs[0].numerics == other
        assert shards.manifest().receipts == tuple(theirs)
        assert "by another writer" in capsys.readouterr().err

    def test_a_shard_without_receipt_does_not_exist_and_is_taken_over(self, tmp_path: Path) -> None:
        shards, receipt = committed(tmp_path / "set", [made_record(number) for number in range(3)])
        before = tree(shards.path)
        (shards.path / "receipts" / f"{receipt.item}.json").unlink()
        assert ShardSet.open(shards.path).manifest().num_records == 0
        shards.commit([made_record(number) for number in range(3)], NUMERICS)
        assert tree(shards.path) == before

    @pytest.mark.parametrize("container", ["zarr", "tar"])
    def test_a_leftover_of_other_numerics_stops_nobody(self, tmp_path: Path, container: str) -> None:
        """Equal records, other bytes: each has its own name, and who comes back finds his own again."""
        records, other = [made_record(number) for number in range(3)], dataclasses.replace(NUMERICS, threads=9)
        shards = ShardSet.create(tmp_path / "set", made_contract())
        left = shards.commit(records, NUMERICS, container=container)
        shards.receipt_path(left.item).unlink()  # as if killed before it
        receipt = shards.commit(records, other, container=container)
        assert (receipt.digest, receipt.numerics) == (left.digest, other) and receipt.stem != left.stem
        check_records(shards.read(receipt))
        before = tree(shards.shards_dir, without=())
        shards.receipt_path(left.item).unlink()
        assert shards.commit(records, NUMERICS, container=container) == left
        assert tree(shards.shards_dir, without=()) == before

    @pytest.mark.parametrize("container", ["zarr", "tar"])
    def test_a_receipt_whose_shard_is_gone_commits_nothing(self, tmp_path: Path, container: str) -> None:
        """Worked again, the item is written again, byte for byte; a torn one too, and never taken for done."""
        records = [made_record(number) for number in range(3)]
        shards = ShardSet.create(tmp_path / "set", made_contract())
        receipt = shards.commit(records, NUMERICS, container=container)
        before = tree(shards.path)
        for path in shards.shards_dir.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert shards.manifest().absent == (receipt.item,)
        assert shards.commit(records, NUMERICS, container=container) == receipt
        assert tree(shards.path) == before and shards.manifest().receipts == (receipt,)
        part = next(iter(receipt.paths(shards.shards_dir).values()))
        part.write_bytes(part.read_bytes()[:-1])
        assert shards.commit(records, NUMERICS, container=container) == receipt
        assert sweep(shards.shards_dir, older_than_s=-1) == 1 and tree(shards.path) == before

    @pytest.mark.parametrize("container", ["zarr", "tar"])
    def test_an_altered_leftover_is_set_aside_and_an_altered_commit_is_not(
        self, tmp_path: Path, container: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        records = [made_record(number) for number in range(3)]
        shards = ShardSet.create(tmp_path / "set", made_contract())
        receipt = shards.commit(records, NUMERICS, container=container)
        before, paths = tree(shards.path), receipt.paths(shards.shards_dir)
        files = {name: path.read_bytes() for name, path in paths.items()}
        part = next(path for name, path in paths.items() if name in (".tar", ".zarr/final/0.0.0.0"))
        part.write_bytes(part.read_bytes()[::-1])
        altered = tree(shards.path)
        with pytest.raises(Corrupt, match="repair"):
            shards.place(receipt, files)
        assert tree(shards.path) == altered and not list(shards.shards_dir.glob(".*"))
        shards.receipt_path(receipt.item).unlink()
        assert shards.commit(records, NUMERICS, container=container) == receipt
        assert "not whole and not committed" in capsys.readouterr().err
        (aside,) = shards.shards_dir.glob(f"{TEMPORARY_PREFIX}*")
        assert aside.name.endswith(f"-{receipt.stem}.{container}")
        assert sweep(shards.shards_dir, older_than_s=-1) == 1 and tree(shards.path) == before

    @pytest.mark.parametrize("times", [1, 99])
    def test_a_copy_under_way_beside_the_writer_is_met_or_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
    ) -> None:
        """Its next file comes as soon as its first ones are out of the way."""
        records, real, come = [made_record(number) for number in range(3)], shards_module.set_aside, []
        shards, receipt = committed(tmp_path / "set", records)
        before, path = tree(shards.path), shards.shards_dir / f"{receipt.stem}.zarr"
        shards.receipt_path(receipt.item).unlink()
        (path / "zarr.json").unlink()

        def set_aside(there: Path) -> Path:
            aside = real(there)
            if len(come) < times:
                come.append(write_atomic(there / "zarr.json", b"{}"))
            return aside

        monkeypatch.setattr(shards_module, "set_aside", set_aside)
        if times == 1:
            assert shards.commit(records, NUMERICS) == receipt
            assert sweep(shards.shards_dir, older_than_s=-1) == 2 and tree(shards.path) == before
        else:
            with pytest.raises(Corrupt, match="stop the copy"):
                shards.commit(records, NUMERICS)

    @pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Contract)])
    def test_a_set_that_means_something_else_is_refused_by_that_field(self, tmp_path: Path, name: str) -> None:
        contract = made_contract(vae="v")  # a set that does not say its VAE takes any: tests/harvest/test_meaning.py
        value = getattr(contract, name)
        other: Any = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 2, str: lambda v: v + "x",
                      tuple: lambda v: (*v, 1)}[type(value)](value)  # fmt: skip
        shards = ShardSet.create(tmp_path / "set", contract)
        with pytest.raises(Refused, match=rf"{name}: "):
            shards.require(dataclasses.replace(contract, **{name: other}))

    def test_an_unknown_format_is_refused(self, tmp_path: Path) -> None:
        shards = ShardSet.create(tmp_path / "set", made_contract())
        path = shards.path / "contract.json"
        values = json.loads(path.read_bytes()) | {"format_version": 99}
        path.write_text(json.dumps(values))
        with pytest.raises(Refused, match="version 99"):
            ShardSet.open(shards.path)

    def test_a_contract_from_before_branches_keeps_its_digest(self, tmp_path: Path) -> None:
        """Written down when there was nothing but both: what old receipts and headers say stays true."""
        two, one = made_contract(), made_contract(boundary=None, guidance=(1.0,))
        assert two.digest().startswith("a97b51bb7bf4601f") and one.digest().startswith("816c636b8aa06939")
        shards = ShardSet.create(tmp_path / "set", two)
        values = json.loads((shards.path / "contract.json").read_bytes())
        assert "branches" not in values and ShardSet.open(shards.path).contract.branches == BOTH
        other = dataclasses.replace(two, branches=GUIDED)
        assert json.loads(other.to_json()) == values | {"branches": "guided"} and other.digest() != two.digest()
        for said in ("neither", None, ["guided"]):
            (shards.path / "contract.json").write_text(json.dumps(values | {"branches": said}))
            with pytest.raises(Refused, match="another format"):
                ShardSet.open(shards.path)

    def test_held_out_is_a_property_of_the_prompt(self, tmp_path: Path) -> None:
        share = np.mean([is_held_out(f"prompt {i}") for i in range(5000)])
        assert 0.015 < share < 0.025
        records = [made_record(number) for number in range(200)]
        _, receipt = committed(tmp_path / "set", records)
        assert receipt.held_out_records().tolist() == [is_held_out(record.prompt) for record in records]
        assert receipt.held_out_records().any()


HALF = np.dtype(np.float16)


def test_bad_values_are_named() -> None:
    record = made_record(0, made_contract(encoding="float32"))
    record.uncond[0, 0, 0, 0] = 70000.0
    assert record.bad_field(np.dtype(np.float32)) is None and (record.bad_field(HALF) or "").startswith("uncond[0]")
    record.uncond[0, 0, 0, 0] = 0.0
    assert record.bad_field(HALF) is None
    record.cond[1, 0, 2, 2] = np.nan
    assert (record.bad_field(HALF) or "").startswith("cond[1] (t=")
    record.latents[0, 0, 0, 0] = np.inf
    assert (record.bad_field(HALF) or "").startswith("latents[0]")
    alone = made_record(0, made_contract(encoding="float32", branches=GUIDED))
    alone.guided[1, 0, 0, 0] = 70000.0  # what guidance multiplies may overflow where neither branch does
    assert alone.bad_field(np.dtype(np.float32)) is None and (alone.bad_field(HALF) or "").startswith("guided[1] (t=")
