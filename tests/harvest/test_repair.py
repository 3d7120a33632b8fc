"""A set with damage in it, and the teacher asked again: the same bytes, or it is said."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import Corrupt, Partial
from common.record import BOTH, GUIDED, item_id
from common.shards import ASSETS, ShardSet
from harvest.config import HarvestConfig
from harvest.granary.look import describe, find, picture
from harvest.granary.recompute import difference, recompute
from harvest.granary.repair import repair
from harvest.granary.verify import verify, verify_assets
from harvest.quarantine import Note
from harvest.status import survey
from tests.harvest.test_resume import as_file
from tests.made import command, harvest_config, made_contract, made_record, planned, tree


@pytest.fixture
def copied(tmp_path: Path, micro_set: Path) -> Path:
    shutil.copytree(micro_set, tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def config(copied: Path, micro_wan: Path, micro_config: HarvestConfig) -> HarvestConfig:
    return harvest_config(copied, micro_wan, prompts={"file": micro_config.prompts.file})


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)


def points_of(set_dir: Path, number: int) -> Path:
    return sorted((set_dir / "shards").glob("*.zarr/points/[0-9]*"))[number]


def test_a_flipped_shard_comes_back_byte_for_byte(config: HarvestConfig, copied: Path, micro_set: Path) -> None:
    flip(points_of(copied, 1))
    shutil.rmtree(points_of(copied, 4).parent.parent)
    flip(sorted((copied / "receipts").iterdir())[2])
    said = list(repair(config, copied))
    assert sum("as it was, byte for byte" in line for line in said) == 2 and "whole again" in said[-1]
    assert tree(copied) == tree(micro_set)
    assert list(repair(config, copied)) == ["nothing is damaged, nothing is quarantined"]


def test_damaged_assets_are_named_and_left_again(config: HarvestConfig, copied: Path, micro_set: Path) -> None:
    weights, negative = "vae/diffusion_pytorch_model.safetensors", "negative.npy"
    for name in (weights, negative):
        flip(copied / ASSETS / name)
    (copied / ASSETS / "scheduler.json").unlink()
    said = command("harvest", "verify", copied)
    assert said.returncode == 5
    for told in (f"{weights} altered", f"{negative} altered", "scheduler.json missing"):
        assert f"item assets: {told}" in said.stdout
    shards = ShardSet.open(copied)
    with pytest.raises(Corrupt, match="altered"):
        picture(shards, shards.read(shards.manifest().receipts[0]).record(0))
    assert sum("left again" in line for line in repair(config, copied)) == 3
    assert tree(copied) == tree(micro_set) and list(verify_assets(ShardSet.open(copied))) == []


def test_what_the_teacher_cannot_say_again_is_said(config: HarvestConfig, copied: Path) -> None:
    flip(copied / ASSETS / "activations.safetensors")
    with pytest.raises(Partial, match=r"activations\.safetensors is damaged"):
        list(repair(config, copied))


def test_other_numerics_make_a_new_generation_that_names_the_old(config: HarvestConfig, copied: Path) -> None:
    flip(points_of(copied, 0))
    (damage,) = verify(ShardSet.open(copied))
    before = ShardSet.open(copied).manifest().by_item[damage.item]
    other = config.model_copy(update={"micro_batch": 1})
    (said,) = repair(other, copied)
    shards = ShardSet.open(copied)
    after = shards.manifest().by_item[damage.item]
    assert "other numerics" in said and after.supersedes == before.digest != after.digest
    assert list(verify(shards)) == [] and shards.manifest().num_records == 24
    assert not list(shards.shards_dir.glob(f"{before.stem}.*"))


def test_what_was_set_aside_is_asked_again(config: HarvestConfig, copied: Path, micro_set: Path) -> None:
    """A shard whose first record had been quarantined: afterwards all records are there, as they would have been."""
    from harvest.granary.select import take

    shards = ShardSet.open(copied)
    receipt = shards.manifest().receipts[0]
    packed = shards.read(receipt).packed()
    shards.receipt_path(receipt.item).unlink()
    shutil.rmtree(shards.shards_dir / f"{receipt.stem}.zarr")
    shards.commit_packed(take(packed, [1, 2, 3], shards.contract), "zarr")  # type: ignore[arg-type]
    keys = list(packed.header.keys)
    fault = {"key": keys[0], "what": "not finite", "where": "cond[0]"}
    Note(item=receipt.item, walked=keys, shard=item_id(keys[1:]), faults=[fault]).write(copied)
    assert list(repair(config, copied)) == [f"quarantine {receipt.item}: 1 of 1 records are sound now"]
    assert list(repair(config, copied)) == ["nothing is damaged, nothing is quarantined"]
    assert survey(copied)["quarantined"] == 0
    assert digests(copied) == digests(micro_set)
    # What was walked together is still known: the same bits, where other neighbours would give others.
    assert bitwise_and_close(*recompute(config, copied, 1.0)) == (24, 0)


def test_a_note_counts_once_the_good_ones_are_committed(config: HarvestConfig, copied: Path) -> None:
    """Killed between the two, the whole item is walked again, as if never before."""
    shards = ShardSet.open(copied)
    receipt = shards.manifest().receipts[0]
    keys = list(shards.read(receipt).header.keys)
    shards.receipt_path(receipt.item).unlink()
    fault = {"key": keys[0], "what": "not finite", "where": "cond[0]"}
    for good, left in (keys[1:], [4]), ([], [3]):  # all of it; all but what nobody can compute
        Note(item=receipt.item, walked=keys, shard=item_id(good) if good else None, faults=[fault]).write(copied)
        assert [len(item.questions) for item in planned(config).remaining(ShardSet.open(copied))] == left
        if good:  # and nobody mends what will be walked whole
            assert list(repair(config, copied)) == ["nothing is damaged, nothing is quarantined"]
            assert survey(copied)["quarantined"] == 0


def digests(set_dir: Path) -> dict[str, str]:
    shards = ShardSet.open(set_dir)
    headers = [shards.read(receipt).header for receipt in shards.manifest().receipts]
    return {key: digest for header in headers for key, digest in zip(header.keys, header.digests, strict=True)}


def test_asking_again_gives_the_same_bits_or_says_so(config: HarvestConfig, copied: Path) -> None:
    bitwise, close = bitwise_and_close(*recompute(config, copied, 0.5))
    assert 12 <= bitwise < 24 and close == 0
    bitwise, close = bitwise_and_close(*recompute(config.model_copy(update={"micro_batch": 1}), copied, 1.0))
    assert bitwise + close == 24 and close > 0
    _alter_silently(copied)
    with pytest.raises(Corrupt, match="1 of 24 records do not come back"):
        list(recompute(config, copied, 1.0))


def bitwise_and_close(said: str) -> tuple[int, int]:
    first, second = re.fullmatch(r"(\d+) records .* bit for bit, (\d+) within .*", said).groups()  # type: ignore
    return int(first), int(second)


@pytest.mark.parametrize("branches", [BOTH, GUIDED])
def test_how_far_a_record_has_moved_is_told_of_the_guided_prediction(branches: str) -> None:
    contract = made_contract(encoding="float32", branches=branches)
    record = made_record(1, contract)
    assert difference(record, record, contract) == 0
    longer = {name: getattr(record, name) * np.float32(1.25) for name in record.point_fields[1:]}
    assert difference(dataclasses.replace(record, **longer), record, contract) == pytest.approx(0.25, rel=1e-5)
    further = dataclasses.replace(record, final=record.final * np.float32(1.5))
    assert difference(further, record, contract) == pytest.approx(0.5, rel=1e-5)


def _alter_silently(set_dir: Path) -> None:
    """What a sick GPU leaves: a whole shard, sealed, of a wrong value."""
    shards = ShardSet.open(set_dir)
    receipt = shards.manifest().receipts[0]
    reader = shards.read(receipt)
    records: list[Any] = [reader.record(row) for row in range(receipt.num_records)]
    records[2].cond[1, 0, 0, 0] += 1
    shards.receipt_path(receipt.item).unlink()
    shutil.rmtree(shards.shards_dir / f"{receipt.stem}.zarr")
    shards.commit(records, receipt.numerics)


def test_the_command_line_of_recompute(config: HarvestConfig, copied: Path, tmp_path: Path) -> None:
    path = as_file(config, tmp_path / "c.yaml")
    done = command("harvest", "verify", copied, "--recompute", "5%", "--config", path)
    assert done.returncode == 0 and "came back bit for bit" in done.stdout, done.stderr
    assert command("harvest", "verify", copied, "--recompute", "5%").returncode == 2


def test_a_record_is_shown_in_numbers_and_drawn(micro_set: Path) -> None:
    import torch
    from diffusers import AutoencoderKLWan

    shards = ShardSet.open(micro_set)
    key = shards.read(shards.manifest().receipts[0]).header.keys[1]
    record, receipt = find(shards, key[:12])
    said = list(describe(record, receipt, shards.contract))
    assert key in said[0] and len(said) == 4 + receipt.num_points + 1
    drawn = picture(shards, record)
    vae = AutoencoderKLWan.from_pretrained(micro_set / "assets" / "vae").eval()
    mean, std = (torch.tensor(getattr(vae.config, name)).view(1, -1, 1, 1, 1) for name in ("latents_mean",
                                                                                           "latents_std"))  # fmt: skip
    with torch.inference_mode():
        pixels = vae.decode(torch.from_numpy(record.final).float()[None, :, None] * std + mean).sample[0, :, 0]
    expected = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert drawn.size == (64, 64) and (np.asarray(drawn) == expected).all()
