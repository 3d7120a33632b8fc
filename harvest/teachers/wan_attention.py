"""Wan's cross-attention over a text whose padding is collapsed and whose keys and values are kept.

    collapse(expert)                          once after loading
    with attending(expert, text): expert(...) Text(rows, bias) of this forward; its keys and values live as long as it

All padding rows are equal, so are their keys and values, and a softmax over n equal keys is one key with a bias of
log n. bfloat16 would round that bias by up to 1.5 % of the padding's weight, so two keys share it: the first takes
what bfloat16 can say, the second the rest. A text does not depend on the timestep: its keys and values are computed
in the first step of a micro-batch and kept for the others.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_KEYS = 2


@dataclass(slots=True, kw_only=True)
class Text:
    """What one forward attends to."""

    rows: Tensor  # [B, L, D], zero beyond each text's own
    bias: Tensor | None = None  # [B, 1, 1, L]; None: every row counts once
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values [B, heads, L, head_dim] by layer, where the padding is collapsed."""


class CollapsedAttention:
    """A diffusers attention processor for one cross-attention layer."""

    def __init__(self) -> None:
        self.text: Text | None = None

    @torch.compiler.disable  # else each layer's kept keys would be a block of its own
    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        assert self.text is not None, "inside `attending`"
        heads = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads).transpose(1, 2)
        if id(self) not in self.text.kept:
            key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, heads).transpose(1, 2)
            value = attn.to_v(encoder_hidden_states).unflatten(2, heads).transpose(1, 2)
            self.text.kept[id(self)] = (key, value)
        key, value = self.text.kept[id(self)]
        bias = None if self.text.bias is None else self.text.bias.to(query.device)  # a split expert's blocks differ
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        result: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2, 3).type_as(query))
        return result


def collapse(expert: Any) -> None:
    """Once is enough; again it is nothing."""
    for block in expert.blocks:
        if not isinstance(block.attn2.processor, CollapsedAttention):
            block.attn2.set_processor(CollapsedAttention())


@contextlib.contextmanager
def attending(expert: Any, text: Text) -> Iterator[None]:
    processors = [block.attn2.processor for block in expert.blocks]
    collapsed = [processor for processor in processors if isinstance(processor, CollapsedAttention)]
    for processor in collapsed:
        processor.text = text
    try:
        yield
    finally:
        for processor in collapsed:
            processor.text = None


def padding_bias(lengths: Sequence[int], num_rows: int, full_length: int) -> Tensor:
    """[B, 1, 1, L]: 0 for a text's own rows; the next two stand for `full_length - length` zero rows; -inf beyond."""
    bias = torch.full((len(lengths), num_rows), -math.inf)
    for row, length in zip(bias, lengths, strict=True):
        row[:length] = 0.0
        count = full_length - length
        if count:
            first = torch.tensor(math.log(count)).view(torch.int32).bitwise_and(-0x10000).view(torch.float32)
            row[length] = first
            rest = count - math.exp(float(first))
            row[length + 1] = math.log(rest) if rest > 0 else -math.inf
    return bias[:, None, None, :]
