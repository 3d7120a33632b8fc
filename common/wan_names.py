"""Wan's transformer tensors by two names: the original repository's (ComfyUI's too) and diffusers'.

diffusers_name("blocks.3.self_attn.q.weight")   ->   "blocks.3.attn1.to_q.weight"
original_name("blocks.3.attn1.to_q.weight")     ->   "blocks.3.self_attn.q.weight"
"""

import re
from collections.abc import Mapping

_TOP = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "patch_embedding": "patch_embedding",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IN_BLOCK = {
    **{f"self_attn.{name}": f"attn1.{ours}" for name, ours in _ATTENTION.items()},
    **{f"cross_attn.{name}": f"attn2.{ours}" for name, ours in _ATTENTION.items()},
    "norm3": "norm2",  # the cross attention's: the only one with weights
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def diffusers_name(name: str) -> str:
    """One that is not known stays as it is, to be refused where the model is filled."""
    return _renamed(name, _TOP, _IN_BLOCK)


def original_name(name: str) -> str:
    return _renamed(name, _turned(_TOP), _turned(_IN_BLOCK))


def _renamed(name: str, top: Mapping[str, str], in_block: Mapping[str, str]) -> str:
    inside = _BLOCK.fullmatch(name)
    prefix, rest = (inside[1], inside[2]) if inside else ("", name)
    for old, new in (in_block if inside else top).items():
        if rest == old or rest.startswith(f"{old}."):
            return f"{prefix}{new}{rest[len(old) :]}"
    return name


def _turned(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}
