"""From a teacher on disk to a student on disk, tensor by tensor: strip time (exact), then shrink (by selection).

    report = project(teacher_dir, read_student_json(path), out_dir, experts="low")

    <teacher>/transformer, transformer_2 -> one tensor -> strip -> its expert, or their mean -> shrink -> out_dir
    out_dir: config.json, report.json, model.safetensors (float32, written last), opened by load_student

Stripping loses nothing. Shrinking keeps the blocks, residual channels, whole heads and feed-forward channels that are
worth most (train/student/importance.py); q, k and v are cut each on its own, norms and modulation follow.
The report says of every student tensor whether it is exact, selected, merged (mean of two experts) or fresh.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.errors import BadUsage, Corrupt
from common.seals import replace, sound
from common.shards import ASSETS, ShardSet
from train.student.cuts import Cut, make_cuts
from train.student.importance import STATISTICS_NAME, ByActivations, ByNorms, Importance, read_statistics
from train.student.network import CONFIG_NAME, WEIGHTS_NAME, StudentConfig, WanLite, remove_weights
from train.student.weights import FolderWeights, safetensors_stream

REPORT_NAME = "report.json"
EXPERT_FOLDERS = {"high": ["transformer"], "low": ["transformer_2"], "mean": ["transformer", "transformer_2"]}

Kind = Literal["exact", "selected", "merged", "fresh"]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    name: str
    kind: Kind
    source: str
    teacher_shape: Shape
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was done, per tensor of the student."""

    teacher: dict[str, Any]
    student: dict[str, Any]
    experts: str
    """low, high, mean, or one of them for each block; `single` where the teacher has one model."""
    chosen_by: str
    """weight norms, activations, or nothing."""
    blocks: list[int]
    tensors: list[TensorReport]

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(tensor.kind for tensor in self.tensors))

    def to_dict(self) -> dict[str, Any]:
        return {"counts": self.counts, **dataclasses.asdict(self)}


class Stripped:
    """A teacher's tensors without time, each of the expert that was asked for, or averaged over both."""

    def __init__(self, teacher_dir: Path, experts: str) -> None:
        """experts: low, high or mean; or one of them for each block, with commas. What comes before the blocks goes
        with the first of them, what comes after them with the last."""
        if not (teacher_dir / "transformer_2").is_dir():
            self.experts, words = "single", ["high"]
        else:
            self.experts, words = experts, experts.split(",")
        _refuse_odd_words(words)
        names = [name for name in EXPERT_FOLDERS["mean"] if any(name in EXPERT_FOLDERS[word] for word in words)]
        configs = [_read_config(teacher_dir / name) for name in names]
        if any(config != configs[0] for config in configs):
            raise BadUsage(wrong="the two experts differ in shape", found=f"{configs[0]} and {configs[1]}",
                           mend="give --experts low or high")  # fmt: skip
        self.config = configs[0]
        if len(words) not in (1, self.config.num_layers):
            raise BadUsage(wrong="--experts names one for all blocks or one for each", found=f"{len(words)} of them",
                           mend=f"the teacher has {self.config.num_layers} blocks")  # fmt: skip
        self._words = words if len(words) > 1 else words * self.config.num_layers
        self._parts = {name: FolderWeights(teacher_dir / name) for name in names}
        for part in self._parts.values():
            _refuse_other_tensors(part, self.config)

    def folders_of(self, name: str) -> list[str]:
        """Where a tensor, or what was seen at a place, comes from: two of them are averaged."""
        block = re.match(r"blocks\.(\d+)\.", name)
        comes_first = name.startswith(("patch_embedding.", "condition_embedder."))
        return EXPERT_FOLDERS[self._words[int(block[1]) if block else 0 if comes_first else -1]]

    def tensor(self, name: str) -> Tensor:
        first, *others = [strip(name, self._parts[folder].tensor(name)) for folder in self.folders_of(name)]
        tensor = sum(others, first) / (1 + len(others)) if others else first
        if not torch.isfinite(tensor).all():
            raise Corrupt(wrong="the teacher's weights are not finite", found=name, mend="fetch the teacher again")
        return tensor


def _refuse_odd_words(words: Sequence[str]) -> None:
    odd = [word for word in words if word not in EXPERT_FOLDERS]
    if odd:
        raise BadUsage(wrong="--experts names no expert", found=odd[0], mend=f"use {', '.join(EXPERT_FOLDERS)}")


def strip(name: str, tensor: Tensor) -> Tensor:
    """Only the patch embedding has a time axis, of length one: without it, it is the same tensor."""
    return tensor.squeeze(2) if name == "patch_embedding.weight" else tensor


def project(teacher_dir: Path, student: StudentConfig, out_dir: Path, *, experts: str = "low",
            statistics_path: Path | None = None) -> Report:  # fmt: skip
    """Write a student cut from the teacher in `teacher_dir` (a diffusers pipeline folder) to `out_dir`."""
    teacher = Stripped(teacher_dir, experts)
    _refuse_misfit(teacher.config, student)
    return cut_out(teacher, student, out_dir, importance_of(teacher, statistics_path))


def statistics_of(shards: ShardSet) -> Path | None:
    """Where a set keeps what its harvest heard of the teacher, if it did."""
    path = sound(shards.path / ASSETS, STATISTICS_NAME)
    return path if path.exists() else None


def importance_of(teacher: Stripped, statistics_path: Path | None) -> Importance:
    """By what a harvest saw, where it is given; of two averaged experts, the average."""
    if statistics_path is None:
        return ByNorms(teacher.tensor, teacher.config)
    seen = {name: read_statistics(statistics_path, name) for name in EXPERT_FOLDERS["mean"]}
    places = next(each for each in seen.values() if each)
    mean = {place: torch.stack([seen[folder][place] for folder in teacher.folders_of(place)]).mean(dim=0)
            for place in places}  # fmt: skip
    return ByActivations(teacher.tensor, teacher.config, mean)


def cut_out(teacher: Stripped, student: StudentConfig, out_dir: Path, importance: Importance) -> Report:
    blocks = importance.blocks(student.num_layers)
    cuts = make_cuts(importance, teacher.tensor, teacher.config, student, blocks)
    report = make_report(teacher, student, blocks, cuts, importance.name)
    remove_weights(out_dir)
    replace(out_dir, CONFIG_NAME, _json_bytes(student.to_dict()))
    replace(out_dir, REPORT_NAME, _json_bytes(report.to_dict()))
    shapes = {tensor.name: tensor.shape for tensor in report.tensors}
    tensors = _shrunk(teacher, cuts, shapes, student.projection_factor)
    metadata = {"format": "pt", "made_by": "train init", "experts": teacher.experts}
    replace(out_dir, WEIGHTS_NAME, safetensors_stream(shapes, tensors, metadata))
    return report


def make_report(
    teacher: Stripped, student: StudentConfig, blocks: list[int], cuts: Mapping[str, Cut], chosen_by: str
) -> Report:
    """Every tensor of the student must have its cut, and no cut may be left over."""
    shapes, teacher_shapes = tensor_shapes(student), tensor_shapes(teacher.config)
    assert cuts.keys() == shapes.keys(), f"unmatched: {sorted(cuts.keys() ^ shapes.keys())}"
    factor = student.projection_factor
    tensors = [
        TensorReport(
            name=name,
            kind=_kind(cuts[name], shape, merged=len(teacher.folders_of(cuts[name].source)) > 1, factor=factor),
            source=cuts[name].source,
            teacher_shape=teacher_shapes[cuts[name].source],
            shape=shape,
        )
        for name, shape in shapes.items()
    ]
    return Report(
        teacher=teacher.config.to_wan_config(),
        student=student.to_dict(),
        experts=teacher.experts,
        chosen_by=chosen_by,
        blocks=blocks,
        tensors=tensors,
    )


def _shrunk(
    teacher: Stripped, cuts: Mapping[str, Cut], shapes: Mapping[str, Shape], factor: float
) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        tensor = cuts[name].of(teacher.tensor(cuts[name].source))
        yield name, tensor * factor if _is_matrix(shape) and factor != 1.0 else tensor


def _is_matrix(shape: Shape) -> bool:
    """Linear and patch weights; biases, gains and modulation tables [1, slots, width] are not multiplied."""
    return len(shape) in (2, 4)


def _kind(cut: Cut, shape: Shape, *, merged: bool, factor: float) -> Kind:
    if merged:
        return "merged"
    untouched = all(keep is None for keep in cut.keeps) and (factor == 1.0 or not _is_matrix(shape))
    return "exact" if untouched else "selected"


def _read_config(folder: Path) -> StudentConfig:
    try:
        return StudentConfig.from_wan_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        raise BadUsage(wrong="the teacher cannot be read", found=f"{folder / 'config.json'}: {error!r}",
                       mend="give the folder that holds model_index.json") from None  # fmt: skip


def _refuse_other_tensors(part: FolderWeights, config: StudentConfig) -> None:
    """A tensor too many or too few means another model than config.json says; nothing is guessed."""
    expected = {
        name: (*shape[:2], 1, *shape[2:]) if name == "patch_embedding.weight" else shape
        for name, shape in tensor_shapes(config).items()
    }
    amiss = sorted(name for name in expected.keys() | part.shapes if expected.get(name) != part.shapes.get(name))
    if amiss:
        name = amiss[0]
        raise BadUsage(wrong=f"{len(amiss)} tensors in {part.folder.name} are not those of its config.json",
                       found=f"{name}: {part.shapes.get(name)} for {expected.get(name)}",
                       mend="give a whole, unmodified Wan text-to-video transformer")  # fmt: skip


SAME = ("in_channels", "out_channels", "patch", "text_dim", "cross_attn_norm", "eps")
NOT_LARGER = ("num_layers", "num_heads", "head_dim", "ffn_dim", "freq_dim")


def _refuse_misfit(teacher: StudentConfig, student: StudentConfig) -> None:
    """A projection only makes smaller, and what the data fixes must be equal."""
    for name in SAME:
        if getattr(teacher, name) != getattr(student, name):
            raise BadUsage(wrong=f"{name} must be the teacher's", found=f"{getattr(student, name)} in the student",
                           mend=f"set it to {getattr(teacher, name)}")  # fmt: skip
    for name in NOT_LARGER:
        if getattr(teacher, name) < getattr(student, name):
            raise BadUsage(wrong=f"the student's {name} is larger than its teacher's",
                           found=str(getattr(student, name)),
                           mend=f"set it to {getattr(teacher, name)} or less")  # fmt: skip
    if teacher.freq_dim % student.freq_dim:
        raise BadUsage(wrong="freq_dim must divide the teacher's, else no frequency survives",
                       found=str(student.freq_dim), mend=f"set it to {teacher.freq_dim}")  # fmt: skip


def tensor_shapes(config: StudentConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of a student, without making it."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in WanLite(config).state_dict().items()}


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
