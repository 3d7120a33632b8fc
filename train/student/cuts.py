"""Which index set cuts which tensor of a Wan transformer, so that whatever writes a channel and reads it agree.

    cuts = make_cuts(importance, read, teacher, student, blocks)    # student's tensor name -> Cut
    student_tensor = cuts[name].of(teacher_tensor(cuts[name].source))

    residual stream   patch_embedding, to_out, ffn.net.2 write; norms, modulation, to_q, ffn.net.0, proj_out read
    text stream       text_embedder.linear_2 writes; attn2.to_k and to_v read
    query/key         to_q, to_k, norm_q, norm_k of one attention; the heads are those of its values
    value             to_v writes, to_out reads
    feed-forward      ffn.net.0 writes, ffn.net.2 reads; likewise inside the two embedders

What a channel is worth is said by train/student/importance.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from train.student.config import StudentConfig
from train.student.importance import Importance, Read
from train.student.selection import (
    Keep,
    in_heads,
    in_slots,
    matching_waves,
    rotary_pairs,
    rows_norm,
    strongest,
    strongest_per_head,
)

Keeps = tuple[Keep, ...]

TIME = "condition_embedder.time_embedder"
TEXT = "condition_embedder.text_embedder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Where a student's tensor comes from, and what is kept along each axis; axes beyond `keeps` are kept whole."""

    source: str
    keeps: tuple[Keep, ...]

    def of(self, tensor: Tensor) -> Tensor:
        for axis, keep in enumerate(self.keeps):
            tensor = tensor if keep is None else tensor.index_select(axis, keep)
        return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Scissors:
    """What every cut is decided from."""

    importance: Importance
    read: Read
    teacher: StudentConfig
    student: StudentConfig
    residual: Keep
    text: Keep


def make_cuts(
    importance: Importance, read: Read, teacher: StudentConfig, student: StudentConfig, blocks: list[int]
) -> dict[str, Cut]:
    """Every tensor of the student by name; `read` gives the teacher's tensors without time."""
    same = teacher.width == student.width
    scissors = Scissors(
        importance=importance,
        read=read,
        teacher=teacher,
        student=student,
        residual=None if same else strongest(importance.residual(blocks), student.width),
        text=strongest(rows_norm(read(f"{TEXT}.linear_2.weight")), student.width),
    )
    cuts = {name: Cut(source=name, keeps=keeps) for name, keeps in _outside_blocks(scissors).items()}
    for own, source in enumerate(blocks):
        for name, keeps in _block(scissors, f"blocks.{source}").items():
            cuts[f"blocks.{own}.{name}"] = Cut(source=f"blocks.{source}.{name}", keeps=keeps)
    return cuts


def _outside_blocks(s: Scissors) -> dict[str, Keeps]:
    waves = matching_waves(s.teacher.freq_dim, s.student.freq_dim)
    time_inner, text_inner = (
        strongest(s.importance.hidden(f"{name}.linear_1.weight", f"{name}.linear_2.weight"), s.student.width)
        for name in (TIME, TEXT)
    )
    slots = in_slots(s.residual, 6, s.teacher.width)
    return {
        "scale_shift_table": (None, None, s.residual),
        **_linear("patch_embedding", s.residual, None),
        **_linear(f"{TIME}.linear_1", time_inner, waves),
        **_linear(f"{TIME}.linear_2", s.residual, time_inner),
        **_linear("condition_embedder.time_proj", slots, s.residual),
        **_linear(f"{TEXT}.linear_1", text_inner, None),
        **_linear(f"{TEXT}.linear_2", s.text, text_inner),
        **_linear("proj_out", None, s.residual),
    }


def _block(s: Scissors, block: str) -> dict[str, Keeps]:
    hidden = s.importance.hidden(f"{block}.ffn.net.0.proj.weight", f"{block}.ffn.net.2.weight")
    inner = strongest(hidden, s.student.ffn_dim)
    norm2: dict[str, Keeps] = {"norm2.weight": (s.residual,), "norm2.bias": (s.residual,)}
    return {
        "scale_shift_table": (None, None, s.residual),
        **_attention(s, block, "attn1", s.residual),
        **_attention(s, block, "attn2", s.text),
        **(norm2 if s.student.cross_attn_norm else {}),
        **_linear("ffn.net.0.proj", inner, s.residual),
        **_linear("ffn.net.2", s.residual, inner),
    }


def _attention(s: Scissors, block: str, name: str, source: Keep) -> dict[str, Keeps]:
    """Heads by the flow of their values; within each kept head its best value channels and its query/key pairs."""
    shape = (s.teacher.num_heads, s.teacher.head_dim)
    part = f"{block}.{name}"
    heads: Keep = None
    value_channels: Keep = None
    if s.teacher.width != s.student.width:
        flow = s.importance.flow(part).view(shape)
        heads = strongest(flow.norm(dim=1), s.student.num_heads)
        value_channels = strongest_per_head(flow, s.student.head_dim)
    turning = name == "attn1"
    channels = rotary_pairs(s.teacher, s.student) if turning else _query_key_channels(s, part)
    query_key = in_heads(heads, channels, *shape)
    value = in_heads(heads, value_channels, *shape)
    return {
        **_linear(f"{name}.to_q", query_key, s.residual),
        **_linear(f"{name}.to_k", query_key, source),
        **_linear(f"{name}.to_v", value, source),
        **_linear(f"{name}.to_out.0", s.residual, value),
        f"{name}.norm_q.weight": (query_key,),
        f"{name}.norm_k.weight": (query_key,),
    }


def _query_key_channels(s: Scissors, part: str) -> Keep:
    """Cross-attention does not turn: any channels of a head will do, so those with the largest products."""
    if s.teacher.head_dim == s.student.head_dim:
        return None
    scores = s.read(f"{part}.norm_q.weight") * s.read(f"{part}.norm_k.weight")
    scores = scores.abs() * rows_norm(s.read(f"{part}.to_q.weight")) * rows_norm(s.read(f"{part}.to_k.weight"))
    return strongest_per_head(scores.view(s.teacher.num_heads, s.teacher.head_dim), s.student.head_dim)


def _linear(name: str, rows: Keep, columns: Keep) -> Mapping[str, Keeps]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
