"""The blocks of which train/vae/network.py builds Wan's autoencoder, each as it acts on a single frame.

All tensors are [B, C, H, W]; attribute names are diffusers', so that its weights load by name.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(dim_in: int, dim_out: int) -> nn.Conv2d:
    return nn.Conv2d(dim_in, dim_out, 3, padding=1)


class ChannelNorm(nn.Module):
    """Each pixel's channels to unit length, times sqrt(channels) and a gain."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, F.normalize(x.float(), dim=1).to(x.dtype) * self.scale * self.gamma)


class Resnet(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(dim_in)
        self.conv1 = conv3x3(dim_in, dim_out)
        self.norm2 = ChannelNorm(dim_out)
        self.conv2 = conv3x3(dim_out, dim_out)
        self.conv_shortcut = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return cast(Tensor, self.conv2(F.silu(self.norm2(h))) + self.conv_shortcut(x))


def resnet_row(dim_in: int, dim_out: int, count: int) -> list[Resnet]:
    return [Resnet(dim_in if i == 0 else dim_out, dim_out) for i in range(count)]


class PixelAttention(nn.Module):
    """Every pixel attends to all others, with a single head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2).unsqueeze(1).transpose(2, 3).contiguous()
        query, key, value = qkv.chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(query, key, value)
        return cast(Tensor, self.proj(out.squeeze(1).transpose(1, 2).reshape(x.shape)) + x)


class Middle(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(dim)])
        self.resnets = nn.ModuleList([Resnet(dim, dim), Resnet(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.resnets[1](self.attentions[0](self.resnets[0](x))))


class Down(nn.Module):
    """Half the size: a strided convolution over the picture with a row and a column of zeros below and right."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.resample(x))


class Double(nn.Module):
    """Twice the size: each pixel four times, then a convolution."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"), conv3x3(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.resample(x))


class Up(nn.Module):
    """A level of the plain decoder."""

    def __init__(self, dim_in: int, dim_out: int, num_res_blocks: int, *, double: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnet_row(dim_in, dim_out, num_res_blocks + 1))
        self.upsamplers = nn.ModuleList([Double(dim_out, dim_out // 2)] if double else [])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x)
        return x


class ResidualDown(nn.Module):
    """A level of the residual encoder, with averages of its input as a shortcut."""

    def __init__(self, resnets: list[Resnet], dim_in: int, dim_out: int, times: int, *, halve: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsampler = Down(dim_out) if halve else nn.Identity()
        self.dim_out, self.times, self.side = dim_out, times, 2 if halve else 1

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for resnet in self.resnets:
            h = resnet(h)
        return cast(Tensor, self.downsampler(h) + self._averaged(x))

    def _averaged(self, x: Tensor) -> Tensor:
        """Neighbours in space and time become channels, in groups that are averaged; the frame's past is zeros."""
        spread = F.pixel_unshuffle(x, self.side)
        batch, _, height, width = spread.shape
        spread = spread.view(batch, x.shape[1], 1, self.side**2, height, width)
        spread = F.pad(spread, (0, 0, 0, 0, 0, 0, self.times - 1, 0))
        return spread.reshape(batch, self.dim_out, -1, height, width).mean(dim=2)


class ResidualUp(nn.Module):
    """A level of the residual decoder, with copies of its input as a shortcut."""

    def __init__(self, dim_in: int, dim_out: int, num_res_blocks: int, times: int, *, double: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnet_row(dim_in, dim_out, num_res_blocks + 1))
        self.upsampler = Double(dim_out, dim_out) if double else nn.Identity()
        self.dim_out, self.times, self.has_shortcut = dim_out, times, double

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for resnet in self.resnets:
            h = resnet(h)
        return cast(Tensor, self.upsampler(h) + self._copied(x)) if self.has_shortcut else h

    def _copied(self, x: Tensor) -> Tensor:
        """Channels become neighbours in space and time; a first frame is the last of its copies in time."""
        batch, dim_in, height, width = x.shape
        copies = x.repeat_interleave(4 * self.times * self.dim_out // dim_in, dim=1)
        last = copies.view(batch, self.dim_out, self.times, 4, height, width)[:, :, -1]
        return F.pixel_shuffle(last.reshape(batch, 4 * self.dim_out, height, width), 2)
