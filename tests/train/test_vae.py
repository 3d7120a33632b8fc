"""The 2D autoencoder against AutoencoderKLWan at one frame, both forms, both ways."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from common.errors import BadUsage, Corrupt
from tests.micro import write_micro_ti2v, write_micro_wan
from train.vae.network import load_vae

WRITERS: dict[str, Callable[..., Path]] = {"plain": write_micro_wan, "residual": write_micro_ti2v}
BOUND = 1e-5


def stock_statistics(stock: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (stock.config.latents_mean, stock.config.latents_std)
    )
    return mean, std


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
@pytest.mark.parametrize("form", list(WRITERS))
def test_one_frame_is_what_the_3d_network_makes_of_it(form: str, size: tuple[int, int], tmp_path: Path) -> None:
    folder = WRITERS[form](tmp_path / form) / "vae"
    stock, flat = AutoencoderKLWan.from_pretrained(folder).eval(), load_vae(folder)
    mean, std = stock_statistics(stock)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, *size, generator=generator) * 2 - 1
    with torch.no_grad():
        truth = ((stock.encode(pixels[:, :, None]).latent_dist.mean - mean) / std)[:, :, 0]
    latents = flat.encode(pixels)
    assert latents.shape[-2:] == (size[0] // flat.config.stride, size[1] // flat.config.stride)
    assert truth.std() > 0.1 and (latents - truth).abs().max() < BOUND
    noise = torch.randn(latents.shape, generator=generator)
    with torch.no_grad():
        truth = stock.decode((noise[:, :, None] * std + mean), return_dict=False)[0][:, :, 0]
    assert truth.std() > 0.1 and (flat.decode(noise) - truth).abs().max() < BOUND


@pytest.mark.parametrize("form", list(WRITERS))
@pytest.mark.parametrize(("mult", "blocks"), [([1, 2, 2], 1), ([1, 2, 4, 4], 2), ([2, 2], 2)])
def test_any_depth_of_the_two_forms(form: str, mult: list[int], blocks: int, tmp_path: Path) -> None:
    pixel_form = (
        {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12} if form == "residual" else {}
    )
    stock = AutoencoderKLWan(
        base_dim=4,
        dim_mult=mult,
        num_res_blocks=blocks,
        temperal_downsample=[True, False, True][: len(mult) - 1],
        **pixel_form,
    ).eval()
    stock.save_pretrained(tmp_path / "vae")
    flat = load_vae(tmp_path / "vae")
    mean, std = stock_statistics(stock)
    with torch.no_grad():
        latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(1))
        truth = stock.decode(latents[:, :, None] * std + mean, return_dict=False)[0][:, :, 0]
        assert (flat.decode(latents) - truth).abs().max() < BOUND
        encoded = ((stock.encode(truth[:, :, None]).latent_dist.mean - mean) / std)[:, :, 0]
        assert (flat.encode(truth) - encoded).abs().max() < BOUND


def test_time_is_gone_and_nothing_else(tmp_path: Path) -> None:
    folder = write_micro_wan(tmp_path / "wan") / "vae"
    stock, flat = AutoencoderKLWan.from_pretrained(folder), load_vae(folder)
    names = {name for name in stock.state_dict() if ".time_conv." not in name}
    assert names == set(flat.state_dict())
    assert sum(p.numel() for p in flat.parameters()) < 0.45 * sum(p.numel() for p in stock.parameters())


def test_variant_files_and_shards_are_read(tmp_path: Path) -> None:
    whole = load_vae(write_micro_wan(tmp_path / "whole") / "vae")
    half = load_vae(write_micro_wan(tmp_path / "half", variant="fp16") / "vae")
    AutoencoderKLWan.from_pretrained(tmp_path / "whole" / "vae").save_pretrained(
        tmp_path / "shards", max_shard_size="20KB"
    )
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    shards = load_vae(tmp_path / "shards")
    for name, value in whole.state_dict().items():
        assert torch.equal(shards.state_dict()[name], value)
        assert torch.equal(half.state_dict()[name], value.half().float())


def test_a_foreign_an_empty_and_a_torn_folder_are_named(tmp_path: Path) -> None:
    folder = write_micro_wan(tmp_path / "wan") / "vae"
    foreign, empty, torn, bare = (shutil.copytree(folder, tmp_path / name)
                                  for name in ("foreign", "empty", "torn", "bare"))  # fmt: skip
    (bare / "config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"_class_name": "AutoencoderKL"}
    (foreign / "config.json").write_text(json.dumps(config))
    next(empty.glob("*.safetensors")).unlink()
    weights = next(torn.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadUsage, match=r"there is no .*bare/config\.json"):
        load_vae(bare)
    with pytest.raises(BadUsage, match="AutoencoderKL"):
        load_vae(foreign)
    with pytest.raises(BadUsage, match="safetensors"):
        load_vae(empty)
    with pytest.raises(Corrupt, match="weight file"):
        load_vae(torn)
