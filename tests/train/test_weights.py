"""The tensor reader and writer against safetensors' own, and against what a bad download leaves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import BadUsage, Corrupt
from common.files import write_atomic
from train.student.weights import FolderWeights, safetensors_stream

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.weight": torch.tensor([-1.5]), "c": torch.full((2, 1, 2, 2), 0.25)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_safetensors_wrote_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({name: value.to(dtype) for name, value in TENSORS.items()}, tmp_path / "model.safetensors")
    weights = FolderWeights(tmp_path)
    assert weights.shapes == {name: tuple(value.shape) for name, value in TENSORS.items()}
    assert all(torch.equal(weights.tensor(name), value) for name, value in TENSORS.items())


def test_what_we_stream_safetensors_reads(tmp_path: Path) -> None:
    shapes = {name: tuple(value.shape) for name, value in TENSORS.items()}
    path = tmp_path / "model.safetensors"
    write_atomic(path, safetensors_stream(shapes, iter(TENSORS.items()), {"format": "pt"}))
    read = load_file(path)
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], value) for name, value in TENSORS.items())
    assert all(torch.equal(FolderWeights(tmp_path).tensor(name), value) for name, value in TENSORS.items())


def test_full_precision_is_preferred_to_a_variant_beside_it(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file(
        {name: 2 * value.half() for name, value in TENSORS.items()},
        tmp_path / "diffusion_pytorch_model.fp16.safetensors",
    )
    assert torch.equal(FolderWeights(tmp_path).tensor("a"), TENSORS["a"])


def test_a_file_torn_anywhere_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    for length in (0, 5, 8, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(Corrupt, match="weight file"):
            FolderWeights(tmp_path)
    for garbage in (whole + b"x", b"\xff" * 8 + whole[8:], whole[:8] + whole[8:].replace(b"F32", b"Q32")):
        path.write_bytes(garbage)
        with pytest.raises(Corrupt, match="weight file"):
            FolderWeights(tmp_path)


def test_half_a_download_says_what_is_missing(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({"a": TENSORS["a"]}, shards / names[0])
    save_file({"c": TENSORS["c"]}, shards / names[1])
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[0], "c": names[1]}}))
    assert FolderWeights(shards).shapes.keys() == {"a", "c"}
    unindexed = shutil.copytree(shards, tmp_path / "unindexed")
    (unindexed / index.name).unlink()
    with pytest.raises(BadUsage, match="index"):
        FolderWeights(unindexed)
    (shards / names[1]).unlink()
    with pytest.raises(BadUsage, match=names[1]):
        FolderWeights(shards)
    index.write_text("{")
    with pytest.raises(Corrupt, match="index"):
        FolderWeights(shards)
