"""Tiles cover everything, leave small pictures alone, and show no seams."""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from train.vae.tiles import begins, in_tiles


def enlarged(x: torch.Tensor) -> torch.Tensor:
    """A network of small reach: a blur, then twice the size."""
    return F.interpolate(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False), scale_factor=2)


@pytest.mark.parametrize("size", [(7, 9), (40, 33), (64, 21), (50, 50)])
def test_tiles_give_what_the_whole_gives(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    seen = []

    def network(part: torch.Tensor) -> torch.Tensor:
        seen.append(part.shape[2:])
        return enlarged(part)

    out = in_tiles(network, x, tile=24, overlap=8, scale=Fraction(2))
    whole = enlarged(x)
    assert out.shape == whole.shape and max(max(side) for side in seen) <= 24
    if max(size) <= 24:
        assert torch.equal(out, whole)
    # A tile's own edge is off by the blur's reach, and counts a ninth there.
    assert (out - whole).abs().mean() < 0.02 * whole.abs().mean()
    constant = in_tiles(enlarged, torch.full((1, 1, *size), 3.0), tile=24, overlap=8, scale=Fraction(2))
    torch.testing.assert_close(constant, torch.full_like(constant, 3.0))


@pytest.mark.parametrize("length", range(20, 200, 7))
def test_tiles_cover_a_side_and_overlap(length: int) -> None:
    found = begins(length, 24, 8)
    assert found[0] == 0 and found[-1] + 24 >= length
    assert all(later - earlier <= 16 for earlier, later in pairwise(found))
    assert found[-1] == max(0, length - 24)


def random_vae() -> Any:
    from tests.micro import VAE
    from train.vae.network import Vae2d, VaeConfig

    torch.manual_seed(0)
    values = {"_class_name": "AutoencoderKLWan", "attn_scales": [],
              "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16,
              "decoder_base_dim": None, "is_residual": False, "in_channels": 3, "out_channels": 3,
              "patch_size": None}  # fmt: skip
    return Vae2d(VaeConfig.from_dict(values | VAE)).eval()


@pytest.mark.parametrize(("side", "num", "most"), [(16, 9, 4), (8, 17, 16), (32, 2, 1)])
def test_many_pictures_take_turns_and_stay_what_they_are(
    side: int, num: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many at once as one tile has room for, here of 32 x 32; a picture alone has other last bits."""
    vae = random_vae()
    latents = torch.randn(num, 16, side, side)
    at_once = vae.decode(latents)
    seen: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr("train.vae.network.TILE", 32)
    torch.testing.assert_close(vae.decode(latents), at_once, rtol=0, atol=5e-5)
    assert max(seen) == most and sum(seen) == num


def test_a_large_picture_is_near_what_the_whole_network_makes_of_it() -> None:
    """The real network, its attention over the whole picture included."""
    vae = random_vae()
    latents = torch.randn(1, 16, 16, 152)
    tiled = vae.decode(latents)
    whole = vae.decoder(vae.post_quant_conv(latents)).clamp(-1, 1)
    assert tiled.shape == whole.shape == (1, 3, 128, 1216)
    assert (tiled - whole).abs().mean() < 0.05 * whole.std()
    encoded = vae.encode(whole)
    assert encoded.shape == latents.shape


def test_tiles_of_an_encoder_begin_where_its_pixels_do() -> None:
    """2008 pixels at stride 8: without it the second tile would begin at 492 and be laid half a latent pixel off."""
    x = torch.arange(2008, dtype=torch.float32).expand(1, 1, 8, -1)

    def halved(part: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(part, 8)

    torch.testing.assert_close(in_tiles(halved, x, tile=1024, overlap=256, scale=Fraction(1, 8)), halved(x))
