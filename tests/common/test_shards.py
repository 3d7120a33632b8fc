"""The granary: what goes in comes out bit for bit, and nothing that was damaged comes out at all.

FormatContract is what every container must pass; a container is admitted by a subclass.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import Corrupt, Refused
from common.manifest import MAX_RECEIPT_BYTES, Receipt
from common.record import Contract, Record
from common.shards import ShardSet, is_held_out
from tests.made import NUMERICS, made_contract, made_record, tree


def committed(path: Path, records: list[Record], contract: Contract | None = None) -> tuple[ShardSet, Receipt]:
    shards = ShardSet.create(path, contract or made_contract())
    return shards, shards.commit(records, NUMERICS)


def same(a: Record, b: Record) -> bool:
    return a.digest() == b.digest() and all(
        np.asarray(getattr(a, field.name)).tobytes() == np.asarray(getattr(b, field.name)).tobytes()
        for field in dataclasses.fields(a)
        if not isinstance(getattr(a, field.name), str)
    )


class TestZarr:
    @pytest.mark.parametrize("encoding", ["float16", "float32"])
    def test_round_trip_is_bit_exact(self, tmp_path: Path, encoding: str) -> None:
        contract = made_contract(encoding=encoding)
        records = [made_record(number, contract) for number in range(7)]
        shards, _ = committed(tmp_path / "set", records, contract)
        opened = ShardSet.open(tmp_path / "set")
        reader = opened.read(opened.manifest().receipts[0])
        assert all(same(reader.record(i), record) for i, record in enumerate(records))
        reader.check()
        assert opened.contract == shards.contract

    def test_the_same_records_give_the_same_bytes(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            committed(tmp_path / name, [made_record(number) for number in range(3)])
        assert tree(tmp_path / "a") == tree(tmp_path / "b")

    def test_stock_zarr_reads_the_same_values(self, tmp_path: Path) -> None:
        import zarr

        records = [made_record(number) for number in range(5)]
        _, receipt = committed(tmp_path / "set", records)
        group: Any = zarr.open_group(tmp_path / "set" / "shards" / receipt.shard, mode="r")
        for i, record in enumerate(records):
            np.testing.assert_array_equal(group["points"][i, :, 0], record.latents)
            np.testing.assert_array_equal(group["points"][i, :, 1], record.cond)
            np.testing.assert_array_equal(group["points"][i, :, 2], record.uncond)
            np.testing.assert_array_equal(group["final"][i], record.final)
        assert group.attrs["shard"]["keys"] == [record.key for record in records]

    def test_zeros_are_stored_not_left_out(self, tmp_path: Path) -> None:
        """Zarr does not write a chunk that equals its fill value, and a missing one reads as that value."""
        record = made_record(0, zero=True)
        shards, receipt = committed(tmp_path / "set", [record])
        assert receipt.files["points/0.0.0.0.0.0"][0] > record.latents.nbytes * 3
        assert same(shards.read(receipt).record(0), record)

    @pytest.mark.parametrize("seed", range(60))
    def test_a_flipped_bit_is_found_and_named(self, tmp_path: Path, seed: int) -> None:
        records = [made_record(number) for number in range(3)]
        shards, receipt = committed(tmp_path / "set", records)
        rng = np.random.default_rng(seed)
        name = sorted(receipt.files)[int(rng.integers(len(receipt.files)))]
        path = shards.path / "shards" / receipt.shard / name
        data = bytearray(path.read_bytes())
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        with pytest.raises(Corrupt, match=receipt.item):
            shards.read(receipt).check()

    @pytest.mark.parametrize("part", ["points/0.0.0.0.0.0", "final/0.0.0.0", "text/0.0", "zarr.json"])
    def test_a_cut_shard_is_absent_and_never_zeros(self, tmp_path: Path, part: str) -> None:
        shards, receipt = committed(tmp_path / "set", [made_record(number) for number in range(3)])
        path = shards.path / "shards" / receipt.shard / part
        path.write_bytes(path.read_bytes()[:-7])
        manifest = ShardSet.open(shards.path).manifest()
        assert manifest.receipts == () and manifest.absent == (receipt.item,)
        with pytest.raises(Corrupt):
            shards.read(receipt).check()

    def test_a_checked_piece_is_named_by_record_and_field(self, tmp_path: Path) -> None:
        records = [made_record(number) for number in range(3)]
        shards, receipt = committed(tmp_path / "set", records)
        reader = shards.read(receipt)
        path = reader.points.path
        data = bytearray(path.read_bytes())
        data[int(reader.points.offsets[1 * 2 + 1]) + 5] ^= 4
        path.write_bytes(data)
        fresh = shards.read(receipt)
        assert same(fresh.record(0), records[0]) and same(fresh.record(2), records[2])
        with pytest.raises(Corrupt, match=rf"record {records[1].key}, point 1 \(latents/cond/uncond\)"):
            fresh.record(1)


class TestCommit:
    def test_a_receipt_is_small_and_closed_by_its_digest(self, tmp_path: Path) -> None:
        shards, receipt = committed(tmp_path / "set", [made_record(number) for number in range(40)])
        path = shards.path / "receipts" / f"{receipt.item}.json"
        assert path.stat().st_size <= MAX_RECEIPT_BYTES
        path.write_bytes(path.read_bytes().replace(b'"num_records": 40', b'"num_records": 41'))
        with pytest.raises(Corrupt, match="receipt"):
            shards.manifest()

    def test_who_commits_first_has_committed(self, tmp_path: Path) -> None:
        shards, first = committed(tmp_path / "set", [made_record(number) for number in range(3)])
        before = tree(shards.path)
        again = shards.commit([made_record(number) for number in range(3)], dataclasses.replace(NUMERICS, threads=9))
        assert again == first and tree(shards.path) == before

    def test_a_shard_without_receipt_does_not_exist_and_is_taken_over(self, tmp_path: Path) -> None:
        shards, receipt = committed(tmp_path / "set", [made_record(number) for number in range(3)])
        before = tree(shards.path)
        (shards.path / "receipts" / f"{receipt.item}.json").unlink()
        assert ShardSet.open(shards.path).manifest().num_records == 0
        shards.commit([made_record(number) for number in range(3)], NUMERICS)
        assert tree(shards.path) == before

    def test_an_altered_leftover_is_not_adopted(self, tmp_path: Path) -> None:
        shards, receipt = committed(tmp_path / "set", [made_record(number) for number in range(3)])
        (shards.path / "receipts" / f"{receipt.item}.json").unlink()
        part = shards.path / "shards" / receipt.shard / "final/0.0.0.0"
        part.write_bytes(part.read_bytes()[::-1])
        with pytest.raises(Corrupt):
            shards.commit([made_record(number) for number in range(3)], NUMERICS)

    @pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Contract)])
    def test_a_set_that_means_something_else_is_refused_by_that_field(self, tmp_path: Path, name: str) -> None:
        contract = made_contract()
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

    def test_held_out_is_a_property_of_the_prompt(self, tmp_path: Path) -> None:
        share = np.mean([is_held_out(f"prompt {i}") for i in range(5000)])
        assert 0.015 < share < 0.025
        records = [made_record(number) for number in range(200)]
        _, receipt = committed(tmp_path / "set", records)
        assert receipt.held_out_records().tolist() == [is_held_out(record.prompt) for record in records]
        assert receipt.held_out_records().any()


def test_bad_values_are_named() -> None:
    record = made_record(0)
    assert record.bad_field() is None
    record.cond[1, 0, 2, 2] = np.nan
    assert (record.bad_field() or "").startswith("cond[1] (t=")
    record.latents[0, 0, 0, 0] = np.inf
    assert (record.bad_field() or "").startswith("latents[0]")
