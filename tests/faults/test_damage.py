"""Random damage, hostile files: always found, always named, never costly."""

import dataclasses
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import Corrupt
from common.manifest import Receipt
from common.shards import ShardSet
from harvest.granary.rebuild import rebuild
from harvest.granary.verify import examine, verify
from tests.common.contract_of_containers import flips_found
from tests.made import NUMERICS, ROOT, made_contract, made_record


def a_shard(path: Path, container: str, *, count: int = 3) -> tuple[ShardSet, Receipt]:
    shards = ShardSet.create(path, made_contract())
    return shards, shards.commit([made_record(number) for number in range(count)], NUMERICS, container=container)


@pytest.mark.full
@pytest.mark.parametrize("container", ["zarr", "tar", "zarr+zstd"])
def test_two_thousand_flipped_bits(tmp_path: Path, container: str) -> None:
    shards, receipt = a_shard(tmp_path / "set", container)
    assert flips_found(shards, receipt, count=2000, seed=3) == 2000


@pytest.mark.parametrize("container", ["zarr", "tar"])
def test_every_flipped_data_bit_names_its_record_and_field(tmp_path: Path, container: str) -> None:
    shards, receipt = a_shard(tmp_path / "set", container)
    data_files = [
        path for name, path in receipt.paths(shards.shards_dir).items() if not name.endswith(("json", ".idx"))
    ]
    rng = np.random.default_rng(0)
    named = 0
    for number in range(120):
        path = data_files[number % len(data_files)]
        data = bytearray(path.read_bytes())
        where = int(rng.integers(len(data)))
        data[where] ^= 1
        path.write_bytes(data)
        (damage,) = examine(shards, receipt)
        assert damage.kind == "altered"
        assert all((receipt.item in piece and "record" in piece) or "all 3 records" in piece for piece in damage.pieces)
        named += bool(damage.pieces)
        data[where] ^= 1
        path.write_bytes(data)
    assert named >= 36  # the rest lies in paddings and member headers, which hold no record


@pytest.mark.parametrize(("container", "step"), [("zarr", 8192), ("tar", 8192),
                                                 pytest.param("zarr", 512, marks=pytest.mark.full),
                                                 pytest.param("tar", 512, marks=pytest.mark.full)])  # fmt: skip
def test_truncation_at_every_block_is_found(tmp_path: Path, container: str, step: int) -> None:
    shards, receipt = a_shard(tmp_path / "set", container)
    for path in receipt.paths(shards.shards_dir).values():
        data = path.read_bytes()
        for size in range(0, len(data), step):
            path.write_bytes(data[:size])
            (damage,) = examine(shards, receipt)
            assert damage.kind == "torn" and damage.pieces
            assert shards.manifest().absent == (receipt.item,)
            with pytest.raises(Corrupt, match=receipt.item):
                reader = shards.read(receipt)
                for index in range(receipt.num_records):
                    reader.record(index)
        path.write_bytes(data)
    assert list(verify(shards)) == []


@pytest.mark.parametrize("container", ["zarr", "tar"])
def test_each_deleted_file_is_named(tmp_path: Path, container: str) -> None:
    shards, receipt = a_shard(tmp_path / "set", container)
    for name, path in receipt.paths(shards.shards_dir).items():
        data = path.read_bytes()
        path.unlink()
        (damage,) = verify(shards)
        assert damage.kind == "missing" and damage.item == receipt.item and damage.file.endswith(name.split("/", 1)[-1])
        assert shards.manifest().absent == (receipt.item,)
        path.write_bytes(data)
    shards.receipt_path(receipt.item).unlink()
    assert shards.manifest().num_records == 0  # uncommitted does not exist; `rebuild` brings it back
    assert list(rebuild(shards)) == [receipt]


HOSTILE_MEMBERS: dict[str, Callable[[tarfile.TarInfo], Any]] = {
    "../../evil": lambda info: None,
    "/tmp/evil": lambda info: None,
    "0123456789abcdef.points.npy": lambda info: setattr(info, "type", tarfile.SYMTYPE),
    "0123456789abcdef.final.npy": lambda info: setattr(info, "type", tarfile.LNKTYPE),
    "0123456789abcdef.json": lambda info: setattr(info, "type", tarfile.CHRTYPE),
    "model.pkl": lambda info: None,
}


@pytest.mark.parametrize("name", HOSTILE_MEMBERS)
def test_hostile_tar_members_are_refused(tmp_path: Path, name: str) -> None:
    shards, receipt = a_shard(tmp_path / "set", "tar")
    path = receipt.paths(shards.shards_dir)[".tar"]
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.linkname = "/etc/passwd"
        HOSTILE_MEMBERS[name](info)
        tar.addfile(info, io.BytesIO(b""))
    shards.receipt_path(receipt.item).unlink()
    (fault,) = rebuild(shards)
    assert isinstance(fault, Corrupt) and "no member of a shard" in str(fault)
    assert shards.manifest().num_records == 0 and not Path("/tmp/evil").exists()


def test_a_pickled_array_is_refused(tmp_path: Path) -> None:
    shards, receipt = a_shard(tmp_path / "set", "tar", count=1)
    path = receipt.paths(shards.shards_dir)[".tar"]
    evil = io.BytesIO()
    np.save(evil, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    _replace_member(path, "points.npy", evil.getvalue())
    shards.receipt_path(receipt.item).unlink()
    (fault,) = rebuild(shards)
    assert isinstance(fault, Corrupt) and "claims object" in str(fault)


def _replace_member(path: Path, ending: str, data: bytes) -> None:
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, old in members:
            new = data if info.name.endswith(ending) else old
            info.size = len(new)
            tar.addfile(info, io.BytesIO(new))


@pytest.mark.parametrize("change", [
    {"stem": "../../../../etc/passwd"}, {"stem": "/etc/passwd-00000000"}, {"files": {"/../../x": [1, 2]}},
    {"files": {".zarr/../../../x": [1, 2]}}, {"num_records": 10**12}, {"num_points": 10**9}, {"num_records": -1},
    {"height": 0}, {"num_tokens": "many"},
])  # fmt: skip
def test_a_receipt_that_points_outside_or_claims_too_much_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    shards, receipt = a_shard(tmp_path / "set", "zarr")
    data = dataclasses.replace(receipt, **change).to_json()
    shards.receipt_path(receipt.item).write_bytes(data)
    with pytest.raises(Corrupt, match="is damaged"):
        Receipt.read(shards.receipt_path(receipt.item))
    (damage,) = verify(shards)
    assert damage.pieces == ("the receipt",) and shards.manifest().absent == (receipt.item,)


GREEDY = """
import json, sys
from pathlib import Path
from common.errors import Fault
from common.shards import ShardSet
from harvest.granary.rebuild import rebuild
shards = ShardSet.open(Path(sys.argv[1]))
said = []
for receipt in shards.manifest().receipts:
    for library in (False, True):
        try:
            reader = shards.read(receipt, library=library)
            [reader.record(i) for i in range(receipt.num_records)]
            said.append("read")
        except Fault as fault:
            said.append(str(fault))
for path in (shards.path / "receipts").iterdir():
    path.unlink()
said += [str(made) for made in rebuild(shards)]
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss begins at the parent's
print(json.dumps({"said": said, "mb": int(peak.split()[1]) / 1024}))
"""


def _claim(shape_of: Callable[[list[int]], list[int]], part: str) -> Callable[[Path, Receipt], None]:
    """Zarr metadata that claims another shape, under a receipt that vouches for it."""

    def change(folder: Path, receipt: Receipt) -> None:
        path = folder / f"{receipt.stem}.zarr" / part / "zarr.json"
        values = json.loads(path.read_bytes())
        values["shape"] = shape_of(values["shape"])
        values["chunk_grid"]["configuration"]["chunk_shape"] = values["shape"]
        path.write_text(json.dumps(values))

    return change


def _header(field: str, value: Any) -> Callable[[Path, Receipt], None]:
    def change(folder: Path, receipt: Receipt) -> None:
        path = folder / f"{receipt.stem}.zarr" / "zarr.json"
        values = json.loads(path.read_bytes())
        values["attributes"]["shard"][field] = value
        path.write_text(json.dumps(values))

    return change


@pytest.mark.parametrize("change", [
    _claim(lambda shape: [10**12, *shape[1:]], "points"), _claim(lambda shape: [10**7, *shape[1:]], "final"),
    _claim(lambda shape: [10**9, 10**9], "text"), _header("text_lengths", [10**12, 4]),
    _header("prompt_of", [10**9] * 3), _header("height", 10**9),
    _header("keys", ["0" * 16] * 3), _header("timesteps", [[0.0] * 100000] * 3),
])  # fmt: skip
def test_greedy_metadata_costs_no_memory(tmp_path: Path, change: Callable[[Path, Receipt], None]) -> None:
    """An attacker who wrote the receipt too: refused in words, under 200 MB."""
    from common.extents import crc32c
    from common.files import write_atomic

    shards, receipt = a_shard(tmp_path / "set", "zarr")
    change(shards.shards_dir, receipt)
    files = {
        name: [path.stat().st_size, crc32c(path.read_bytes())]
        for name, path in receipt.paths(shards.shards_dir).items()
    }
    write_atomic(shards.receipt_path(receipt.item), dataclasses.replace(receipt, files=files).to_json())
    done = subprocess.run(
        [sys.executable, "-c", GREEDY, str(shards.path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mb"] < 200
    assert any(said != "read" for said in found["said"])


def test_a_deep_nest_of_json_is_refused(tmp_path: Path) -> None:
    shards, receipt = a_shard(tmp_path / "set", "zarr")
    shards.receipt_path(receipt.item).write_bytes(b"[" * 2000)
    with pytest.raises(Corrupt):
        Receipt.read(shards.receipt_path(receipt.item))
    assert shards.manifest().absent == (receipt.item,)
