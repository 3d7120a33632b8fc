"""Which part of a teacher a smaller student keeps: pure index arithmetic over weight norms.

    blocks = spread(num_teacher_layers, num_student_layers)          # evenly, first and last always
    keep = strongest(scores, count)                                  # the `count` best, in their own order
    pairs = rotary_pairs(teacher, student)                           # channels of a head that keep their frequency

An index set of None means 'all of them, as they are': that is how a same-size cut stays exact.
"""

import torch
from torch import Tensor

from train.student.config import StudentConfig

Keep = Tensor | None


def spread(available: int, wanted: int) -> list[int]:
    """`wanted` of `available` blocks, evenly spread; the first and the last are always among two or more."""
    if wanted == 1:
        return [0]
    return [round(i * (available - 1) / (wanted - 1)) for i in range(wanted)]


def strongest(scores: Tensor, wanted: int) -> Keep:
    """Indices of the best scores, ascending; equal scores go to the lower index."""
    if wanted == scores.numel():
        return None
    order = torch.sort(scores, descending=True, stable=True).indices[:wanted]
    return torch.sort(order).values


def rows_norm(tensor: Tensor) -> Tensor:
    """Per output channel: the norm of all that writes into it."""
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1)


def columns_norm(tensor: Tensor) -> Tensor:
    """Per input channel: the norm of all that reads from it."""
    return torch.linalg.vector_norm(tensor, dim=0)


def rotary_pairs(teacher: StudentConfig, student: StudentConfig) -> Keep:
    """Channels of a head, in the student's order, that turn at the student's frequencies or as near as there are.

    Frequencies are powers theta**(-2i/dim) within each of the three segments, so pair i of a shorter segment matches
    pair i * longer / shorter. The still segment may grow (head_dim 12 has 4 still channels, 10 has 6): it then takes
    over the pairs of the other two that turn least.
    """
    if teacher.head_dim == student.head_dim:
        return None
    starts = [0, teacher.rotary_split[0], teacher.rotary_split[0] + teacher.rotary_split[1]]
    segments: list[list[int]] = []
    for start, longer, shorter in zip(starts, teacher.rotary_split, student.rotary_split, strict=True):
        step = max(1.0, longer / shorter)
        places = [int(i * step + 0.5) for i in range(min(longer, shorter) // 2)]
        segments.append([start + 2 * place for place in places])
    taken = {channel for segment in segments for channel in segment}
    slow = [starts[axis] + 2 * pair for pair in reversed(range(teacher.rotary_split[1] // 2)) for axis in (2, 1)]
    spare = [channel for channel in slow if channel not in taken]
    segments[0] += spare[: student.rotary_split[0] // 2 - len(segments[0])]
    firsts = [channel for segment in segments for channel in segment]
    return torch.tensor([channel + half for channel in firsts for half in (0, 1)])


def in_heads(heads: Keep, channels: Tensor | None, num_heads: int, head_dim: int) -> Keep:
    """Indices into the concatenated heads: whole heads, and within each the same `channels` or its own row of them."""
    if heads is None and channels is None:
        return None
    heads = torch.arange(num_heads) if heads is None else heads
    channels = torch.arange(head_dim) if channels is None else channels
    per_head = channels[heads] if channels.ndim == 2 else channels.expand(len(heads), -1)
    return (heads.unsqueeze(1) * head_dim + per_head).flatten()


def strongest_per_head(scores: Tensor, wanted: int) -> Keep:
    """[head, channel] scores -> [head, wanted] channels of each head, ascending."""
    if wanted == scores.shape[1]:
        return None
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :wanted]
    return torch.sort(order, dim=1).values


def matching_waves(teacher_dim: int, student_dim: int) -> Keep:
    """Columns of the timestep's sinusoids (cosines, then sines) that have the frequencies of a shorter embedding."""
    if teacher_dim == student_dim:
        return None
    step = teacher_dim // student_dim
    half = torch.arange(0, teacher_dim // 2, step)
    return torch.cat([half, half + teacher_dim // 2])


def in_slots(keep: Keep, num_slots: int, width: int) -> Keep:
    """The same channels in each of several slots that lie one after the other."""
    return None if keep is None else torch.cat([keep + slot * width for slot in range(num_slots)])
