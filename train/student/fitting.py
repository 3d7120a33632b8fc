"""A student file against the set that it will be trained on: what differs is refused with the right number, or mended.

student = fitted(Path("configs/students/small.json"), shards)                       refused if it does not fit
student = fitted(path, shards, mended_path=out / "student.json")                    mended, and written there
"""

import json
from pathlib import Path
from typing import Any

from common.errors import BadUsage, Refused
from common.files import write_atomic
from common.shards import ShardSet
from train.student.config import StudentConfig, read_student_json, strip_comments


def fitted(path: Path, shards: ShardSet, *, mended_path: Path | None = None) -> StudentConfig:
    values = _read(path)
    wanted = {name: number for name, number in wants_of(shards, values).items() if values.get(name) != number}
    if wanted and mended_path is None:
        raise Refused(
            wrong="the student does not fit the set",
            found=", ".join(f"{name} {values.get(name)}, the set wants {number}" for name, number in wanted.items()),
            mend=f"write that into {path}, or give --adapt to have a mended file written",
        )
    if wanted and mended_path is not None:
        write_atomic(mended_path, (json.dumps(values | wanted, indent=2) + "\n").encode())
        path = mended_path
    student = read_student_json(path)
    _require_sizes(student, shards)
    return student


def wants_of(shards: ShardSet, values: dict[str, Any]) -> dict[str, int]:
    """Keys of a student file that are the set's to say."""
    contract = shards.contract
    wants = {"num_channels": contract.latent_channels, "text_encoder_output_dim": contract.text_dim}
    if values.get("patch_size", 0) % contract.latent_stride:
        wants["patch_size"] = contract.latent_stride * contract.latent_patch
    if "vae_stride" in values or contract.latent_stride != (16 if contract.latent_channels == 48 else 8):
        wants["vae_stride"] = contract.latent_stride
    if contract.text_length != values.get("text_padded_length", 512):
        wants["text_padded_length"] = contract.text_length
    return wants


def _require_sizes(student: StudentConfig, shards: ShardSet) -> None:
    unit = student.vae_stride * student.patch
    for height, width in sorted({(receipt.height, receipt.width) for receipt in shards.manifest().receipts}):
        if height % unit or width % unit:
            raise Refused(
                wrong="the set holds pictures that the student's patches do not tile",
                found=f"{height}x{width} with {unit} pixels per token side",
                mend=f"set patch_size to {shards.contract.latent_stride * shards.contract.latent_patch}",
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(strip_comments(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BadUsage(
            wrong="the student file cannot be read",
            found=f"{path}: {error}",
            mend="give a JSON file like those in configs/students/",
        ) from None
    if not isinstance(values, dict):
        raise BadUsage(wrong=f"{path} is no student", found=type(values).__name__, mend='write {"hidden_size": ...}')
    return values
