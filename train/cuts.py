"""Which index set cuts which tensor of a Wan transformer, so that whatever writes a channel and reads it agree.

    cuts = make_cuts(teacher_tensor, teacher, student, blocks)      # student's tensor name -> Cut
    student_tensor = cuts[name].of(teacher_tensor(cuts[name].source))

    residual stream   patch_embedding, to_out, ffn.net.2 write; norms, modulation, to_q, ffn.net.0, proj_out read
    text stream       text_embedder.linear_2 writes; attn2.to_k and to_v read
    query/key         to_q, to_k, norm_q, norm_k of one attention; the heads are those of its values
    value             to_v writes, to_out reads
    feed-forward      ffn.net.0 writes, ffn.net.2 reads; likewise inside the two embedders

What scores a channel is the norm of the weights that write it, times the norm of those that read it where both are few.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from train.selection import (
    Keep,
    columns_norm,
    in_heads,
    in_slots,
    matching_waves,
    rotary_pairs,
    rows_norm,
    strongest,
    strongest_per_head,
)
from train.student_config import StudentConfig

Read = Callable[[str], Tensor]
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


def make_cuts(read: Read, teacher: StudentConfig, student: StudentConfig, blocks: list[int]) -> dict[str, Cut]:
    """Every tensor of the student by name; `read` gives the teacher's tensors without time."""
    residual = _residual(read, teacher, student, blocks)
    text = _strongest_rows(read, f"{TEXT}.linear_2.weight", student.width)
    cuts = {
        name: Cut(source=name, keeps=keeps)
        for name, keeps in _outside_blocks(read, teacher, student, residual, text).items()
    }
    for own, source in enumerate(blocks):
        for name, keeps in _block(read, teacher, student, f"blocks.{source}", residual, text).items():
            cuts[f"blocks.{own}.{name}"] = Cut(source=f"blocks.{source}.{name}", keeps=keeps)
    return cuts


def _outside_blocks(
    read: Read, teacher: StudentConfig, student: StudentConfig, residual: Keep, text: Keep
) -> dict[str, Keeps]:
    waves = matching_waves(teacher.freq_dim, student.freq_dim)
    time_inner = _strongest_between(read, f"{TIME}.linear_1.weight", f"{TIME}.linear_2.weight", student.width)
    text_inner = _strongest_between(read, f"{TEXT}.linear_1.weight", f"{TEXT}.linear_2.weight", student.width)
    slots = in_slots(residual, 6, teacher.width)
    return {
        "scale_shift_table": (None, None, residual),
        **_linear("patch_embedding", residual, None),
        **_linear(f"{TIME}.linear_1", time_inner, waves),
        **_linear(f"{TIME}.linear_2", residual, time_inner),
        **_linear("condition_embedder.time_proj", slots, residual),
        **_linear(f"{TEXT}.linear_1", text_inner, None),
        **_linear(f"{TEXT}.linear_2", text, text_inner),
        **_linear("proj_out", None, residual),
    }


def _block(
    read: Read, teacher: StudentConfig, student: StudentConfig, block: str, residual: Keep, text: Keep
) -> dict[str, Keeps]:
    inner = _strongest_between(read, f"{block}.ffn.net.0.proj.weight", f"{block}.ffn.net.2.weight", student.ffn_dim)
    norm2: dict[str, Keeps] = {"norm2.weight": (residual,), "norm2.bias": (residual,)}
    return {
        "scale_shift_table": (None, None, residual),
        **_attention(read, teacher, student, block, "attn1", residual, residual),
        **_attention(read, teacher, student, block, "attn2", residual, text),
        **(norm2 if student.cross_attn_norm else {}),
        **_linear("ffn.net.0.proj", inner, residual),
        **_linear("ffn.net.2", residual, inner),
    }


def _attention(
    read: Read,
    teacher: StudentConfig,
    student: StudentConfig,
    block: str,
    name: str,
    residual: Keep,
    source: Keep,
) -> dict[str, Keeps]:
    """Heads by value times output norms; within each kept head its best value channels and its query/key pairs."""
    shape = (teacher.num_heads, teacher.head_dim)
    part = f"{block}.{name}"
    heads: Keep = None
    value_channels: Keep = None
    if teacher.width != student.width:
        flow = rows_norm(read(f"{part}.to_v.weight")) * columns_norm(read(f"{part}.to_out.0.weight"))
        heads = strongest(flow.view(shape).norm(dim=1), student.num_heads)
        value_channels = strongest_per_head(flow.view(shape), student.head_dim)
    turning = name == "attn1"
    channels = rotary_pairs(teacher, student) if turning else _query_key_channels(read, teacher, student, part)
    query_key = in_heads(heads, channels, *shape)
    value = in_heads(heads, value_channels, *shape)
    return {
        **_linear(f"{name}.to_q", query_key, residual),
        **_linear(f"{name}.to_k", query_key, source),
        **_linear(f"{name}.to_v", value, source),
        **_linear(f"{name}.to_out.0", residual, value),
        f"{name}.norm_q.weight": (query_key,),
        f"{name}.norm_k.weight": (query_key,),
    }


def _query_key_channels(read: Read, teacher: StudentConfig, student: StudentConfig, part: str) -> Keep:
    """Cross-attention does not turn: any channels of a head will do, so those with the largest products."""
    if teacher.head_dim == student.head_dim:
        return None
    scores = read(f"{part}.norm_q.weight") * read(f"{part}.norm_k.weight")
    scores = scores.abs() * rows_norm(read(f"{part}.to_q.weight")) * rows_norm(read(f"{part}.to_k.weight"))
    return strongest_per_head(scores.view(teacher.num_heads, teacher.head_dim), student.head_dim)


def _residual(read: Read, teacher: StudentConfig, student: StudentConfig, blocks: list[int]) -> Keep:
    """By the norm of all that writes into a channel, over the blocks that stay."""
    if teacher.width == student.width:
        return None
    writers = ["patch_embedding.weight"]
    for block in blocks:
        writers += [f"blocks.{block}.{name}.weight" for name in ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")]
    squares = [rows_norm(read(name)).square() for name in writers]
    return strongest(sum(squares[1:], squares[0]), student.width)


def _strongest_rows(read: Read, writer: str, wanted: int) -> Keep:
    return strongest(rows_norm(read(writer)), wanted)


def _strongest_between(read: Read, writer: str, reader: str, wanted: int) -> Keep:
    """Hidden channels of two linears in a row, by what enters times what leaves."""
    return strongest(rows_norm(read(writer)) * columns_norm(read(reader)), wanted)


def _linear(name: str, rows: Keep, columns: Keep) -> Mapping[str, Keeps]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
