"""Wan-Lite: Wan's transformer without time. Pure torch; the parameter names are diffusers' own.

    student = WanLite(StudentConfig.from_wan_config(config)).eval()
    velocity_BCHW = student(latents_BCHW, timesteps_B, text_BLD, lengths_B)      # padding collapsed into one key
    velocity_BCHW = student(latents_BCHW, timesteps_B, padded_text_BLD)          # text already padded: no mask
    velocity_BCHW = student(latents_BCHW, timesteps_B, text_BLD, lengths_B, w_B)      # one that is told the guidance

At one frame Wan is 2D already, so a student of its teacher's size with the time axis squeezed out of the patch kernel
is its teacher: every operation below keeps the order, dtype and memory layout of diffusers' WanTransformer3DModel.

Suffixes: B batch, C latent channels, H W latent rows and columns, N image tokens, L text rows, D channels,
S modulation slots (shift, scale, gate), A attention heads, K channels of a head.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import Corrupt
from common.seals import remove, replace, sound
from common.tensor_file import read_header
from train.student.config import CONFIG_NAME, MAKE_AGAIN, StudentConfig, read_config, read_student_json
from train.student.layers import (
    FeedForward,
    Float32LayerNorm,
    TwoLinears,
    attended,
    guidance_waves,
    normalised,
    sinusoids,
)
from train.student.rotary import Rotary, turned
from train.student.weights import tensors_of

__all__ = ["CONFIG_NAME", "StudentConfig", "WanLite", "load_student", "read_student_json", "save_student",
           "student_files"]  # fmt: skip

WEIGHTS_NAME = "model.safetensors"


class WanLite(nn.Module):
    """The student; `collapse_padding` and `gradient_checkpointing` may be switched at any time."""

    def __init__(
        self, config: StudentConfig, *, collapse_padding: bool = True, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.collapse_padding = collapse_padding
        self.gradient_checkpointing = gradient_checkpointing
        self.rope = Rotary(config.rotary_split, config.rope_max_seq_len)
        self.patch_embedding = nn.Conv2d(config.in_channels, width, kernel_size=config.patch, stride=config.patch)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = Float32LayerNorm(width, config.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(width, config.out_channels * config.patch**2)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, lengths: Tensor | None = None,
                guidance: Tensor | None = None) -> Tensor:  # fmt: skip
        """latents [B,C,H,W], timesteps [B] on 0..1000, text [B,L,D], lengths [B] (rows of text that are real),
        guidance [B] if and only if `guidance_embeds`."""
        patch = self.config.patch
        rows, columns = latents.shape[2] // patch, latents.shape[3] // patch
        rotary = self.rope(rows, columns)
        x_BND = self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
        text_BLD, bias_B11L = self._padded(text, lengths)
        time_BD, slots_BSD, text_BLD = self.condition_embedder(timesteps, text_BLD, guidance)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BND = checkpoint(block, x_BND, text_BLD, bias_B11L, slots_BSD, rotary, use_reentrant=False)
            else:
                x_BND = block(x_BND, text_BLD, bias_B11L, slots_BSD, rotary)
        shift_B1D, scale_B1D = (self.scale_shift_table + time_BD.unsqueeze(1)).chunk(2, dim=1)
        x_BND = (self.norm_out(x_BND.float()) * (1 + scale_B1D) + shift_B1D).type_as(x_BND)
        x_BND = self.proj_out(x_BND)
        x_BHWPPC = x_BND.reshape(latents.shape[0], rows, columns, patch, patch, -1)
        velocity_BCHW: Tensor = x_BHWPPC.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return velocity_BCHW

    def _padded(self, text_BLD: Tensor, lengths_B: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Text as it is attended, and the bias of its keys when padding is collapsed."""
        if lengths_B is None:
            return text_BLD, None
        num_rows = text_BLD.shape[1]
        assert num_rows <= self.config.text_length, "cut the text to the padded length first"
        real_BL = torch.arange(num_rows, device=text_BLD.device) < lengths_B.unsqueeze(1)
        text_BLD = text_BLD * real_BL.unsqueeze(2)
        if not self.collapse_padding:
            return F.pad(text_BLD, (0, 0, 0, self.config.text_length - num_rows)), None
        bias_BL = torch.cat([real_BL.float().log(), padding_bias(self.config.text_length - lengths_B)], dim=1)
        # CUDA's fused kernels want the rows of a mask aligned to 8.
        spare = -bias_BL.shape[1] % 8 if text_BLD.is_cuda else 0
        bias_BL = F.pad(bias_BL, (0, spare), value=-math.inf)
        return F.pad(text_BLD, (0, 0, 0, bias_BL.shape[1] - num_rows)), bias_BL[:, None, None, :]


def padding_bias(counts_B: Tensor) -> Tensor:
    """[B, 2]: attention biases with which two zero rows weigh as much as `counts_B` of them.

    All padding rows are equal, so are their keys and values, and one key with bias log(count) gives the same sum;
    but bfloat16 rounds that log by up to 1.5 % of the sum. So the first key takes what it can say, the second the rest.
    """
    counts_B = counts_B.float()
    first_B = (counts_B.log().view(torch.int32) & -0x10000).view(torch.float32)
    return torch.stack([first_B, (counts_B - first_B.exp()).clamp(min=0).log()], dim=1)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the timestep shifts, scales and gates the first and the last."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = Float32LayerNorm(width, config.eps, elementwise_affine=False)
        self.attn1 = Attention(config)
        self.attn2 = Attention(config)
        self.norm2 = Float32LayerNorm(width, config.eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(width, config.ffn_dim)
        self.norm3 = Float32LayerNorm(width, config.eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(
        self,
        x_BND: Tensor,
        text_BLD: Tensor,
        bias_B11L: Tensor | None,
        slots_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        slots = (self.scale_shift_table + slots_BSD.float()).chunk(6, dim=1)
        shift_B1D, scale_B1D, gate_B1D, ffn_shift_B1D, ffn_scale_B1D, ffn_gate_B1D = slots
        h_BND = (self.norm1(x_BND.float()) * (1 + scale_B1D) + shift_B1D).type_as(x_BND)
        h_BND = self.attn1(h_BND, h_BND, None, rotary)
        x_BND = (x_BND.float() + h_BND * gate_B1D).type_as(x_BND)
        h_BND = self.norm2(x_BND.float()).type_as(x_BND)
        x_BND = x_BND + self.attn2(h_BND, text_BLD, bias_B11L, None)
        h_BND = (self.norm3(x_BND.float()) * (1 + ffn_scale_B1D) + ffn_shift_B1D).type_as(x_BND)
        h_BND = self.ffn(h_BND)
        out_BND: Tensor = (x_BND.float() + h_BND.float() * ffn_gate_B1D).type_as(x_BND)
        return out_BND


class Attention(nn.Module):
    """Multi-head attention; queries and keys are normalised across all heads together, as Wan does."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = nn.RMSNorm(width, eps=config.eps)
        self.norm_k = nn.RMSNorm(width, eps=config.eps)

    def forward(
        self, x_BND: Tensor, source_BLD: Tensor, bias_B11L: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        query, key = normalised(self.norm_q, self.to_q(x_BND)), normalised(self.norm_k, self.to_k(source_BLD))
        heads = (self.num_heads, -1)
        q_BNAK, k_BLAK = query.unflatten(2, heads), key.unflatten(2, heads)
        v_BLAK = self.to_v(source_BLD).unflatten(2, heads)
        if rotary is not None:
            q_BNAK, k_BLAK = turned(q_BNAK, *rotary), turned(k_BLAK, *rotary)
        q_BANK, k_BALK, v_BALK = (tensor.permute(0, 2, 1, 3) for tensor in (q_BNAK, k_BLAK, v_BLAK))
        out_BANK = attended(q_BANK, k_BALK, v_BALK, bias_B11L)
        out_BND = out_BANK.permute(0, 2, 1, 3).flatten(2, 3).type_as(query)
        return cast(Tensor, self.to_out[0](out_BND))


class ConditionEmbedder(nn.Module):
    """Timestep -> its embedding and the six modulation slots that all blocks share; text -> the blocks' width."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLinears(config.freq_dim, config.width, nn.SiLU())
        self.time_proj = nn.Linear(config.width, 6 * config.width)
        self.text_embedder = TwoLinears(config.text_dim, config.width, nn.GELU(approximate="tanh"))
        hears = config.guidance_embeds
        self.guidance_embedder = TwoLinears(config.freq_dim, config.width, nn.SiLU()) if hears else None

    def forward(
        self, timesteps_B: Tensor, text_BLD: Tensor, guidance_B: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        waves_BD = sinusoids(timesteps_B, self.freq_dim).to(self.time_embedder.linear_1.weight.dtype)
        time_BD = self.time_embedder(waves_BD)
        assert (guidance_B is None) == (self.guidance_embedder is None), "guidance is told to who hears it, and to him"
        if guidance_B is not None and self.guidance_embedder is not None:
            time_BD = time_BD + self.guidance_embedder(guidance_waves(guidance_B, self.freq_dim).to(waves_BD.dtype))
        time_BD = time_BD.type_as(text_BLD)
        slots_BSD = self.time_proj(F.silu(time_BD)).unflatten(1, (6, -1))
        return time_BD, slots_BSD, self.text_embedder(text_BLD)


def student_files(config: StudentConfig, weights: dict[str, Tensor], **metadata: str) -> dict[str, bytes]:
    """config.json and model.safetensors."""
    config_text = json.dumps(config.to_dict(), indent=2) + "\n"
    return {CONFIG_NAME: config_text.encode(), WEIGHTS_NAME: save(weights, metadata={"format": "pt", **metadata})}


def save_student(folder: Path, config: StudentConfig, weights: dict[str, Tensor], **metadata: str) -> None:
    remove_weights(folder)
    for name, data in student_files(config, weights, **metadata).items():
        replace(folder, name, data)


def remove_weights(folder: Path) -> None:
    """Of a student that is to be replaced: they go first and come last, so that a folder with weights is whole."""
    remove(folder, WEIGHTS_NAME)
    (folder / WEIGHTS_NAME).unlink(missing_ok=True)  # of an older release: without a seal


def load_student(folder: Path, **switches: Any) -> WanLite:
    """Open what `train init` or `save_student` wrote; every tensor must fit."""
    sound(folder, CONFIG_NAME)
    student = WanLite(read_config(folder), **switches)
    path, mine = sound(folder, WEIGHTS_NAME), student.state_dict()
    _require_fit(path, mine)
    for name, tensor in tensors_of(path):
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise Corrupt(wrong=f"{path} holds weights that are not finite", found=name, mend=MAKE_AGAIN)
        mine[name].copy_(tensor)
    return student


def _require_fit(path: Path, mine: Mapping[str, Tensor]) -> None:
    theirs = {name: stored.shape for name, stored in read_header(path).items()}
    here = {name: tuple(tensor.shape) for name, tensor in mine.items()}
    odd = next((name for name in sorted(theirs.keys() | here.keys()) if theirs.get(name) != here.get(name)), None)
    if odd:
        raise Corrupt(wrong=f"{path} does not fit the {CONFIG_NAME} beside it",
                      found=f"{odd} {theirs.get(odd)} for {here.get(odd)}", mend=MAKE_AGAIN)  # fmt: skip
