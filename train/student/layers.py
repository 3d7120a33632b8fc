"""The small parts of the student: linears in pairs, norms, attention's kernel, sinusoids. Suffixes as in network.py."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoids(timesteps_B: Tensor, dim: int) -> Tensor:
    """Cosines first, then sines (DDPM's embedding, arXiv 2006.11239, with the halves exchanged)."""
    exponents = -math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, device=timesteps_B.device) / (dim // 2)
    angles = timesteps_B[:, None].float() * torch.exp(exponents)[None, :]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def guidance_waves(guidance_B: Tensor, dim: int) -> Tensor:
    """w times a thousand, on the timesteps' scale (as in LCM, Luo et al. 2310.04378)."""
    return sinusoids(1000 * guidance_B, dim)


class TwoLinears(nn.Module):
    def __init__(self, dim_in: int, dim_out: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim_out)
        self.activation = activation
        self.linear_2 = nn.Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear_2(self.activation(self.linear_1(x))))


class FeedForward(nn.Module):
    """`net.0.proj`, GELU, `net.2`: the gap keeps diffusers' numbering."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluLinear(width, inner), nn.Identity(), nn.Linear(inner, width)])

    def forward(self, x_BND: Tensor) -> Tensor:
        return cast(Tensor, self.net[2](self.net[0](x_BND)))


class GeluLinear(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class Float32LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if part is None else part.float() for part in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def normalised(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """In the dtype of its weight: under autocast a bfloat16 input and a float32 weight find no fused kernel."""
    return cast(Tensor, norm(x.to(norm.weight.dtype)))


def attended(q_BANK: Tensor, k_BALK: Tensor, v_BALK: Tensor, bias_B11L: Tensor | None) -> Tensor:
    """Under autocast on a CPU in float32: the backward pass of its bfloat16 kernel takes five times as long."""
    if torch.is_autocast_enabled("cpu") and q_BANK.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q_BANK.float(), k_BALK.float(), v_BALK.float(), attn_mask=bias_B11L)
    bias = None if bias_B11L is None else bias_B11L.to(q_BANK.dtype)
    return F.scaled_dot_product_attention(q_BANK, k_BALK, v_BALK, attn_mask=bias)
