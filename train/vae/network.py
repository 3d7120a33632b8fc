"""Wan's autoencoder for one frame, as the 2D network that it is: latents <-> pixels without diffusers.

    vae = load_vae(set_dir / "assets" / "vae")          # a diffusers vae folder, or a copy of one
    latents_BCHW = vae.encode(pixels_BCHW)              # pixels in [-1, 1]; latents as the transformer knows them
    pixels_BCHW = vae.decode(latents_BCHW)

    encode: pixels -> (patches) -> encoder -> quant_conv -> mean -> minus latents_mean, over latents_std
    decode: latents -> denormalised -> post_quant_conv -> decoder -> (patches) -> clamped pixels

The causal convolutions see zeros as a first frame's past, so the last temporal slice of each kernel is all that acts;
the convolutions that halve or double time are never run on it. Both forms of AutoencoderKLWan are here: the plain one
(Wan 2.1 and A14B, stride 8) and the residual one (TI2V 5B, patches of 2, stride 16). Parameter names are diffusers'.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import BadUsage
from train.student.config import read_values
from train.student.weights import FolderWeights
from train.vae.blocks import ChannelNorm, Down, Middle, ResidualDown, ResidualUp, Up, conv3x3, resnet_row
from train.vae.tiles import in_tiles

TILE, OVERLAP = 128, 32
"""Latent pixels: what is larger goes through in tiles, so that memory stays that of one tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeConfig:
    """What a vae folder's config.json says, as far as one frame is concerned."""

    base_dim: int
    decoder_base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_down: tuple[bool, ...]
    """Which levels halve time: of no effect on one frame but for the shape of the residual form's shortcuts."""
    is_residual: bool
    in_channels: int
    out_channels: int
    patch: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @property
    def stride(self) -> int:
        """Pixels per latent pixel."""
        return self.patch << (len(self.dim_mult) - 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VaeConfig":
        if values.get("_class_name") != "AutoencoderKLWan" or values["attn_scales"]:
            raise BadUsage(wrong="this is no Wan autoencoder",
                           found=f"{values.get('_class_name')}, attn_scales {values.get('attn_scales')}",
                           mend="give the vae folder of a Wan model")  # fmt: skip
        return cls(
            base_dim=values["base_dim"],
            decoder_base_dim=values["decoder_base_dim"] or values["base_dim"],
            z_dim=values["z_dim"],
            dim_mult=tuple(values["dim_mult"]),
            num_res_blocks=values["num_res_blocks"],
            temporal_down=tuple(values["temperal_downsample"]),
            is_residual=values["is_residual"],
            in_channels=values["in_channels"],
            out_channels=values["out_channels"],
            patch=values["patch_size"] or 1,
            latents_mean=tuple(values["latents_mean"]),
            latents_std=tuple(values["latents_std"]),
        )


def load_vae(folder: Path) -> "Vae2d":
    """Opens a vae folder and strips time from its weights; every tensor that acts on one frame must be there."""
    vae = Vae2d(VaeConfig.from_dict(_with_defaults(read_vae_values(folder))))
    weights = FolderWeights(folder)
    flat = {name: _flat(weights.tensor(name)) for name in weights.shapes if ".time_conv." not in name}
    vae.load_state_dict(flat, strict=True)
    return vae.eval().requires_grad_(False)


def read_vae_values(folder: Path) -> dict[str, Any]:
    """config.json of an autoencoder of any class."""
    return read_values(folder / "config.json", mend="copy the whole vae folder of the teacher there")


def _with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Folders written before the residual form existed lack its keys."""
    late = {"decoder_base_dim": None, "is_residual": False, "in_channels": 3, "out_channels": 3, "patch_size": None}
    return {**late, **values}


def _flat(tensor: Tensor) -> Tensor:
    """A 3D kernel's last temporal slice; the gain of a norm over [C,T,H,W] without its T."""
    if tensor.ndim == 5:
        return tensor[:, :, -1].contiguous()
    return tensor.squeeze(1) if tensor.ndim == 4 and tensor.shape[1:] == (1, 1, 1) else tensor


class Vae2d(nn.Module):
    """Both directions; built by `load_vae`."""

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        self.register_buffer("mean", torch.tensor(config.latents_mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("inverse_std", 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1), persistent=False)

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        # Patches are laid width first; pixel_unshuffle lays height first.
        x = F.pixel_unshuffle(pixels_BCHW.transpose(2, 3), self.config.patch).transpose(2, 3)
        patches = self.config.stride // self.config.patch
        mean_BCHW = in_tiles(self._mean, x, tile=TILE * patches, overlap=OVERLAP * patches, scale=Fraction(1, patches))
        return (mean_BCHW - self.mean) * self.inverse_std

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        x = self.post_quant_conv(latents_BCHW / self.inverse_std + self.mean)
        scale = Fraction(self.config.stride // self.config.patch)
        x = in_tiles(self.decoder, x, tile=TILE, overlap=OVERLAP, scale=scale)
        pixels_BCHW = F.pixel_shuffle(x.transpose(2, 3), self.config.patch).transpose(2, 3)
        return pixels_BCHW.clamp(-1.0, 1.0)

    def _mean(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.quant_conv(self.encoder(x)).chunk(2, dim=1)[0])


class Encoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        dims = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        last = len(config.dim_mult) - 1
        self.conv_in = conv3x3(config.in_channels, dims[0])
        self.down_blocks = nn.ModuleList()
        for level, (dim_in, dim_out) in enumerate(pairwise(dims)):
            resnets = resnet_row(dim_in, dim_out, config.num_res_blocks)
            if config.is_residual:
                times = 2 if level < last and config.temporal_down[level] else 1
                self.down_blocks.append(ResidualDown(resnets, dim_in, dim_out, times, halve=level < last))
            else:
                self.down_blocks.extend([*resnets, *([Down(dim_out)] if level < last else [])])
        self.mid_block = Middle(dims[-1])
        self.norm_out = ChannelNorm(dims[-1])
        self.conv_out = conv3x3(dims[-1], 2 * config.z_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(self.mid_block(x)))))


class Decoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        dims = [config.decoder_base_dim * factor for factor in (config.dim_mult[-1], *reversed(config.dim_mult))]
        last = len(config.dim_mult) - 1
        self.conv_in = conv3x3(config.z_dim, dims[0])
        self.mid_block = Middle(dims[0])
        self.up_blocks = nn.ModuleList()
        for level, (dim_in, dim_out) in enumerate(pairwise(dims)):
            if config.is_residual:
                times = 2 if level < last and config.temporal_down[last - 1 - level] else 1
                self.up_blocks.append(ResidualUp(dim_in, dim_out, config.num_res_blocks, times, double=level < last))
            else:  # the plain form's upsampling halves the channels of all levels but the first
                dim_in = dim_in if level == 0 else dim_in // 2
                self.up_blocks.append(Up(dim_in, dim_out, config.num_res_blocks, double=level < last))
        self.norm_out = ChannelNorm(dims[-1])
        self.conv_out = conv3x3(dims[-1], config.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(x))))
