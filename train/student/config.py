"""The student's architecture, and the two files it is read from. Free of torch, so that command lines can look early.

    config = read_student_json(Path("configs/students/small.json"))   # what users write; `//` comments welcome
    config = StudentConfig.from_wan_config(json.loads(...))           # a diffusers transformer's config.json
    config = read_config(folder)                                      # our own config.json beside model.safetensors

An unknown key, a wrong type or sizes that do not divide are refused here, before a tensor is made.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from common.config import Section, check
from common.errors import BadUsage, Corrupt

CONFIG_NAME = "config.json"
MAKE_AGAIN = "make the student again: train init, or train export --format wanlite"
CLASS_NAME = "WanLite"
WAN_CLASS_NAME = "WanTransformer3DModel"
QK_NORM = "rms_norm_across_heads"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig:
    """Everything that decides a tensor's shape or a number in the forward pass; three fields at the end do neither."""

    num_layers: int
    num_heads: int
    head_dim: int
    in_channels: int
    out_channels: int
    patch: int
    """Latent pixels per token side."""
    text_dim: int
    ffn_dim: int
    freq_dim: int = 256
    text_length: int = 512
    """Rows that are attended, padding included: what the teacher was fed, not what the prompt fills."""
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    """Most tokens along one side of the picture."""
    guidance_embeds: bool = False
    """Whether it is told the guidance, which no Wan is. Files that do not say so mean no."""
    text_max_length: int = 512
    """Most rows of a prompt that are kept; longer ones are cut before padding."""
    vae_stride: int = 8
    projection_factor: float = 1.0
    """Multiplier on projected weights; 1.0 changes nothing."""

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.num_heads * self.head_dim

    @property
    def rotary_split(self) -> tuple[int, int, int]:
        """Channels of a head that turn with time (still, in a picture), with height and with width, as Wan splits."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side

    @classmethod
    def from_wan_config(cls, wan: Mapping[str, Any]) -> "StudentConfig":
        """The student of a teacher's own size."""
        _refuse_foreign(wan)
        return cls(
            num_layers=wan["num_layers"],
            num_heads=wan["num_attention_heads"],
            head_dim=wan["attention_head_dim"],
            in_channels=wan["in_channels"],
            out_channels=wan["out_channels"] or wan["in_channels"],
            patch=wan["patch_size"][1],
            text_dim=wan["text_dim"],
            ffn_dim=wan["ffn_dim"],
            freq_dim=wan["freq_dim"],
            cross_attn_norm=wan["cross_attn_norm"],
            eps=wan["eps"],
            rope_max_seq_len=wan["rope_max_seq_len"],
            vae_stride=16 if wan["in_channels"] == 48 else 8,
        )

    def to_wan_config(self) -> dict[str, Any]:
        """The config.json under which stock diffusers opens these weights, time axis restored."""
        return {
            "_class_name": WAN_CLASS_NAME,
            "patch_size": [1, self.patch, self.patch],
            "num_attention_heads": self.num_heads,
            "attention_head_dim": self.head_dim,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "text_dim": self.text_dim,
            "freq_dim": self.freq_dim,
            "ffn_dim": self.ffn_dim,
            "num_layers": self.num_layers,
            "cross_attn_norm": self.cross_attn_norm,
            "qk_norm": QK_NORM,
            "eps": self.eps,
            "image_dim": None,
            "added_kv_proj_dim": None,
            "rope_max_seq_len": self.rope_max_seq_len,
            "pos_embed_seq_len": None,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StudentConfig":
        """Our own config.json, every field of it."""
        names = {field.name for field in dataclasses.fields(cls)}
        told = {"guidance_embeds": False} | dict(values)
        fields = {name: value for name, value in told.items() if name != "_class_name"}
        if values.get("_class_name") != CLASS_NAME or fields.keys() != names:
            raise BadUsage(wrong="this config.json is not a Wan-Lite student's",
                           found=f"_class_name {values.get('_class_name')!r}, {sorted(fields.keys() ^ names)} amiss",
                           mend="give a folder of `train init` or `train export --format wanlite`")  # fmt: skip
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        if not self.guidance_embeds:
            del fields["guidance_embeds"]
        return {"_class_name": CLASS_NAME, **fields}


def _refuse_foreign(wan: Mapping[str, Any]) -> None:
    """Wan has siblings (image-to-video, VACE, Animate) with inputs that a text-to-image student has no use for."""
    mend = "use a Wan text-to-video transformer: T2V A14B, TI2V 5B, or Wan 2.1 T2V"
    if wan.get("_class_name", WAN_CLASS_NAME) != WAN_CLASS_NAME:
        raise BadUsage(wrong="the teacher is no Wan transformer", found=str(wan["_class_name"]), mend=mend)
    for name in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        if wan.get(name) is not None:
            raise BadUsage(wrong="the teacher wants an image as input", found=f"{name} {wan[name]}", mend=mend)
    patch = tuple(wan["patch_size"])
    if len(patch) != 3 or patch[0] != 1 or patch[1] != patch[2] or wan["qk_norm"] != QK_NORM:
        raise BadUsage(wrong="the teacher's layout is not Wan's", found=f"patch_size {patch}, qk_norm {wan['qk_norm']}",
                       mend=mend)  # fmt: skip


def read_config(folder: Path) -> StudentConfig:
    return StudentConfig.from_dict(read_values(folder / CONFIG_NAME, mend=MAKE_AGAIN))


def read_values(path: Path, *, mend: str) -> dict[str, Any]:
    """Of a JSON file that came with weights."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise BadUsage(wrong=f"there is no {path}", found=error.strerror or "unreadable", mend=mend) from None
    except (ValueError, RecursionError) as error:
        raise Corrupt(wrong=f"{path} cannot be read", found=str(error), mend=mend) from None
    if not isinstance(values, dict):
        raise Corrupt(wrong=f"{path} cannot be read", found=f"a {type(values).__name__}", mend=mend)
    return values


class StudentJson(Section):
    """The keys of a student's JSON file, as its users know them."""

    model_type: Literal["WanLiteStudent"] = "WanLiteStudent"
    hidden_size: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_channels: int = Field(gt=0)
    image_size: int = Field(default=512, gt=0)
    patch_size: int = Field(gt=0)
    text_max_length: int = Field(default=512, gt=0)
    text_encoder_output_dim: int = Field(gt=0)
    projection_factor: float = Field(default=1.0, gt=0)
    ffn_dim: int | None = Field(default=None, gt=0)
    freq_dim: int = Field(default=256, gt=0)
    text_padded_length: int = Field(default=512, gt=0)
    cross_attn_norm: bool = True
    eps: float = Field(default=1e-6, gt=0)
    vae_stride: int | None = Field(default=None, gt=0)


def read_student_json(path: Path) -> StudentConfig:
    """A user's student file; BadUsage names the key, what stands there and what would do."""
    try:
        values = json.loads(strip_comments(path.read_text(encoding="utf-8")), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError) as error:
        raise BadUsage(wrong="the student file cannot be read", found=f"{path}: {error}",
                       mend="give a JSON file like those in configs/students/") from None  # fmt: skip
    if not isinstance(values, dict):
        raise BadUsage(wrong=f"{path} is no student", found=type(values).__name__, mend='write {"hidden_size": ...}')
    student = check(StudentJson, values, source=str(path))
    stride = student.vae_stride or (16 if student.num_channels == 48 else 8)
    _refuse_uneven(student, stride)
    return StudentConfig(
        num_layers=student.depth,
        num_heads=student.num_heads,
        head_dim=student.hidden_size // student.num_heads,
        in_channels=student.num_channels,
        out_channels=student.num_channels,
        patch=student.patch_size // stride,
        text_dim=student.text_encoder_output_dim,
        ffn_dim=student.ffn_dim or 4 * student.hidden_size,
        freq_dim=student.freq_dim,
        text_length=student.text_padded_length,
        cross_attn_norm=student.cross_attn_norm,
        eps=student.eps,
        rope_max_seq_len=max(1024, student.image_size // student.patch_size),
        text_max_length=min(student.text_max_length, student.text_padded_length),
        vae_stride=stride,
        projection_factor=student.projection_factor,
    )


def _refuse_uneven(student: StudentJson, stride: int) -> None:
    if student.patch_size % stride:
        raise BadUsage(wrong="patch_size is pixels per token side: the VAE's stride times the latent patch",
                       found=f"{student.patch_size} with stride {stride}", mend=f"e.g. {2 * stride}")  # fmt: skip
    if student.image_size % student.patch_size:
        nearest = max(1, round(student.image_size / student.patch_size)) * student.patch_size
        raise BadUsage(wrong="image_size is no multiple of patch_size",
                       found=f"{student.image_size} with {student.patch_size}", mend=f"e.g. {nearest}")  # fmt: skip
    head_dim, rest = divmod(student.hidden_size, student.num_heads)
    if rest or head_dim % 2 or head_dim < 6:
        nearest = max(6, 2 * round(student.hidden_size / student.num_heads / 2)) * student.num_heads
        raise BadUsage(wrong="hidden_size / num_heads must be even and at least 6 (rotary pairs for height and width)",
                       found=f"{student.hidden_size} / {student.num_heads}",
                       mend=f"e.g. hidden_size {nearest}")  # fmt: skip
    if student.freq_dim % 2:
        raise BadUsage(wrong="freq_dim must be even", found=str(student.freq_dim), mend="Wan's is 256")


def strip_comments(text: str) -> str:
    """Blanks `// ...` to the end of the line, but not inside strings, so that error positions stay true."""
    return re.sub(r'("(?:\\.|[^"\\\n])*")|//[^\n]*', lambda match: match[1] or "", text)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for index, (key, _) in enumerate(pairs):
        if key in [earlier for earlier, _ in pairs[:index]]:
            raise ValueError(f"key '{key}' stands twice")
    return dict(pairs)
