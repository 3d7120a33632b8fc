"""What every container must pass, with either kind of points. A container is admitted by subclasses that name it and
the branches that are kept (tests/common/test_shards.py)."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from common.encoding import INT8
from common.errors import Corrupt
from common.manifest import Receipt
from common.record import BOTH, Contract, Record
from common.shard_reader import OffsetReader, check_records
from common.shards import ShardSet
from harvest.granary.verify import require_whole, verify
from tests.made import NUMERICS, made_contract, made_record, tree


def same(a: Record, b: Record) -> bool:
    """Every field, bit for bit, dtype and shape too."""
    if a.point_fields != b.point_fields:
        return False
    names = [f.name for f in dataclasses.fields(a) if getattr(a, f.name) is not None]
    pairs = [(np.asarray(getattr(a, name)), np.asarray(getattr(b, name))) for name in names]
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs)


def guided(record: Record, contract: Contract) -> Any:
    """In double precision, by the formula itself."""
    if record.guided is not None:
        return record.guided.astype(np.float64)
    w = np.asarray(contract.guidance)[record.expert][:, None, None, None]
    return record.uncond + w * (record.cond.astype(np.float64) - record.uncond)  # type: ignore[operator, union-attr]


class ContainerContract:
    """Subclassed per container."""

    container: ClassVar[str]
    branches: ClassVar[str] = BOTH
    data_files: ClassVar[tuple[str, ...]]
    """Files whose bytes are read by extents, not at opening."""

    def stock_values(self, stem: Path) -> list[dict[str, Any]]:
        """points [K, F, C, H, W], final, text and key of each record, read by the format's stock client."""
        raise AssertionError("say how a stock client reads it")

    def committed(self, path: Path, numbers: range, **contract: Any) -> tuple[ShardSet, Receipt, list[Record]]:
        meaning = made_contract(branches=self.branches, **contract)
        records = [made_record(number, meaning) for number in numbers]
        shards = ShardSet.create(path, meaning)
        return shards, shards.commit(records, NUMERICS, container=self.container), records

    @pytest.mark.parametrize("library", [False, True])
    @pytest.mark.parametrize("encoding", ["float16", "float32"])
    def test_round_trip_is_bit_exact(self, tmp_path: Path, encoding: str, library: bool) -> None:
        shards, _, records = self.committed(tmp_path / "set", range(7), encoding=encoding)
        opened = ShardSet.open(tmp_path / "set")
        reader = opened.read(opened.manifest().receipts[0], library=library)
        assert all(same(reader.record(i), record) for i, record in enumerate(records))
        check_records(reader)
        assert opened.contract == shards.contract

    def test_int8_costs_what_it_says_and_reads_the_same_both_ways(self, tmp_path: Path) -> None:
        shards, receipt, records = self.committed(tmp_path / "set", range(4), encoding=INT8)
        fast, slow = shards.read(receipt), shards.read(receipt, library=True)
        for i, record in enumerate(records):
            back = fast.record(i)
            assert same(back, slow.record(i)) and np.array_equal(back.latents, record.latents)
            true, found = (guided(each, shards.contract) for each in (record, back))
            assert 0.002 < np.linalg.norm(found - true) / np.linalg.norm(true) <= receipt.guided_error * 1.01 < 0.01

    def test_the_same_records_give_the_same_bytes(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            self.committed(tmp_path / name, range(3))
        assert tree(tmp_path / "a") == tree(tmp_path / "b")

    def test_a_stock_client_reads_the_same_values(self, tmp_path: Path) -> None:
        shards, receipt, records = self.committed(tmp_path / "set", range(5))
        values = self.stock_values(shards.shards_dir / receipt.stem)
        assert len(values) == len(records)
        for value, record in zip(values, records, strict=True):
            assert value["key"] == record.key
            for number, name in enumerate(shards.contract.point_fields):
                np.testing.assert_array_equal(value["points"][:, number], getattr(record, name))
            for name in ("final", "text"):
                np.testing.assert_array_equal(value[name], getattr(record, name))

    def test_zeros_are_stored_not_left_out(self, tmp_path: Path) -> None:
        contract = made_contract(branches=self.branches)
        record = made_record(0, contract, zero=True)
        shards = ShardSet.create(tmp_path / "set", contract)
        receipt = shards.commit([record], NUMERICS, container=self.container)
        assert receipt.num_bytes > len(record.point_fields) * record.latents.nbytes + record.final.nbytes
        assert all(path.exists() for path in receipt.paths(shards.shards_dir).values())
        assert same(shards.read(receipt).record(0), record) and same(
            shards.read(receipt, library=True).record(0), record
        )

    def test_several_sizes_live_in_one_set(self, tmp_path: Path) -> None:
        shards, _, _ = self.committed(tmp_path / "set", range(3))
        wide = [made_record(number, shards.contract, side=128) for number in range(10, 12)]
        shards.commit(wide, NUMERICS, container=self.container)
        by_size = {receipt.height: receipt for receipt in shards.manifest().receipts}
        assert set(by_size) == {64, 128} and same(shards.read(by_size[128]).record(1), wide[1])

    def test_any_flipped_bit_is_found_and_the_item_named(self, tmp_path: Path) -> None:
        shards, receipt, _ = self.committed(tmp_path / "set", range(3))
        assert flips_found(shards, receipt, count=60, seed=1) == 60

    def test_a_cut_file_is_absent_and_never_zeros(self, tmp_path: Path) -> None:
        shards, receipt, _ = self.committed(tmp_path / "set", range(3))
        for path in receipt.paths(shards.shards_dir).values():
            data = path.read_bytes()
            path.write_bytes(data[:-7])
            manifest = ShardSet.open(shards.path).manifest()
            assert manifest.receipts == () and manifest.absent == (receipt.item,)
            with pytest.raises(Corrupt, match=receipt.item):
                require_whole(shards, receipt)
            path.unlink()
            with pytest.raises(Corrupt, match=receipt.item):
                require_whole(shards, receipt)
            path.write_bytes(data)
        require_whole(shards, receipt)

    def test_damage_names_record_and_field_and_spares_the_rest(self, tmp_path: Path) -> None:
        shards, receipt, records = self.committed(tmp_path / "set", range(3))
        extents = OffsetReader(shards.shards_dir, receipt, shards.contract).tables.points
        path, offsets = extents.path, extents.offsets
        data = bytearray(path.read_bytes())
        data[int(offsets[1 * 2 + 1]) + 5] ^= 4
        path.write_bytes(data)
        reader = shards.read(receipt)
        assert same(reader.record(0), records[0]) and same(reader.record(2), records[2])
        fields = {BOTH: "latents/cond/uncond"}.get(self.branches, "latents/guided")
        with pytest.raises(Corrupt, match=rf"record {records[1].key}, point 1 \({fields}\)"):
            reader.record(1)
        (damage,) = verify(shards)
        assert f"record {records[1].key}, point 1 ({fields})" in str(damage)


def flips_found(shards: ShardSet, receipt: Receipt, *, count: int, seed: int) -> int:
    """Flip `count` random bits, one at a time; how many are found with the item's name."""
    rng = np.random.default_rng(seed)
    found = 0
    paths = receipt.paths(shards.shards_dir)
    sizes = np.array([size for size, _ in receipt.files.values()], float)
    for _ in range(count):
        path = list(paths.values())[int(rng.choice(len(sizes), p=(sizes**0.5) / (sizes**0.5).sum()))]
        data = bytearray(path.read_bytes())
        where, bit = int(rng.integers(len(data))), 1 << int(rng.integers(8))
        data[where] ^= bit
        path.write_bytes(data)
        try:
            require_whole(shards, receipt)
        except Corrupt as fault:
            found += receipt.item in str(fault)
        data[where] ^= bit
        path.write_bytes(data)
    return found
