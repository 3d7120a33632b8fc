"""A student in the forms that other tools open. Neither diffusers nor transformers is imported.

    export(run_or_checkpoint, out, form="diffusers", text_encoder=teacher_dir)

diffusers   a folder that stock WanPipeline opens: the student as `transformer`, the set's VAE, the scheduler that
            `train sample` walks; text encoder and tokenizer by link, or copied
comfyui     one safetensors file with the original Wan tensor names (heads of 128 channels, freq_dim 256)
wanlite     config.json and model.safetensors, as `train init` writes them

Every form says where it comes from: teacher, contract, training, licence.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load, save
from torch import Tensor

from common.config import load_config
from common.errors import BadUsage, Refused
from common.files import pieces, write_atomic, write_folder
from common.record import Contract
from common.shards import ASSETS, ShardSet
from common.wan_names import original_name
from train.card import card, code_version
from train.config import TrainConfig
from train.objective import Objective, objective_of
from train.run_folder import CONFIG_NAME, EMA_NAME, MODEL_NAME, checkpoints
from train.state import read_checkpoint
from train.student.network import StudentConfig, save_student

Form = Literal["diffusers", "comfyui", "wanlite"]
TEXT_PARTS = ("text_encoder", "tokenizer")
VAE_CLASS = "AutoencoderKLWan"
COMFY_HEAD_DIM, COMFY_FREQ_DIM = 128, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A checkpoint with everything that its forms must say."""

    student: StudentConfig
    weights: dict[str, Tensor]
    contract: Contract
    assets_dir: Path
    objective: Objective
    provenance: dict[str, str]

    def card(self, *, has_text_encoder: bool) -> str:
        return card(self.student, self.contract, self.objective, self.provenance, has_text_encoder=has_text_encoder)


def export(source: Path, out: Path, *, form: Form, averaged: bool = True, text_encoder: Path | None = None,
           copy: bool = False, license_name: str = "unknown") -> None:  # fmt: skip
    """`source` is a run (its newest checkpoint) or a checkpoint; `averaged`: its EMA, else the raw weights."""
    if out.exists():
        raise BadUsage(wrong="--out exists", found=str(out), mend="give another name, or remove it")
    finished = _read(source, averaged=averaged, license_name=license_name)
    if form == "wanlite":
        save_student(out, finished.student, finished.weights, **finished.provenance)
        write_atomic(out / "README.md", finished.card(has_text_encoder=False).encode())
    elif form == "comfyui":
        _refuse_what_comfyui_cannot_open(finished.student)
        named = {original_name(name): tensor for name, tensor in with_time(finished.weights).items()}
        write_atomic(out, save(named, metadata={"format": "pt", **finished.provenance}))
    else:
        _refuse_what_wan_pipeline_cannot_open(finished)
        _write_pipeline(finished, out, text_encoder, copy=copy)


def with_time(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The patch kernel gets its time axis back, of length one: the reverse of train.student.projection.strip."""
    return {
        name: tensor.unsqueeze(2) if name == "patch_embedding.weight" else tensor for name, tensor in weights.items()
    }


def _read(source: Path, *, averaged: bool, license_name: str) -> Finished:
    found = checkpoints(source)
    folder = found[-1] if found else source
    run_dir = folder.parent.parent
    if not (run_dir / CONFIG_NAME).exists():
        raise BadUsage(wrong="there is no checkpoint to export", found=str(source),
                       mend="give a run, or one of its checkpoints")  # fmt: skip
    summary, files = read_checkpoint(folder)
    config = load_config(TrainConfig, run_dir / CONFIG_NAME)
    shards = ShardSet.open(config.set)
    contract = shards.contract
    provenance = {
        "made_by": code_version(),
        "teacher": contract.teacher,
        "teacher_weights": contract.weights,
        "contract": contract.digest(),
        "objective": config.objective,
        "averaged": "yes" if averaged else "no",
        "steps": str(summary["step"]),
        "samples_seen": str(summary["samples_seen"]),
        "license": license_name,
    }
    return Finished(
        student=StudentConfig.from_dict(summary["student"]),
        weights=load(files[EMA_NAME if averaged else MODEL_NAME]),
        contract=contract,
        assets_dir=shards.path / ASSETS,
        objective=objective_of(config, contract),
        provenance=provenance,
    )


def _write_pipeline(finished: Finished, out: Path, text_encoder: Path | None, *, copy: bool) -> None:
    classes = _text_classes(text_encoder)
    weights = save(with_time(finished.weights), metadata={"format": "pt", **finished.provenance})
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        **classes,
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", VAE_CLASS],
    }
    few = finished.objective.spans is not None  # the card says how to walk them: the shift is in the levels already
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": finished.contract.train_steps,
        "shift": 1.0 if few else finished.contract.shift,
    }
    told = finished.card(has_text_encoder=text_encoder is not None)
    write_folder(out, {
        "model_index.json": _json_bytes(index),
        "README.md": told.encode(),
        "scheduler/scheduler_config.json": _json_bytes(scheduler),
        "transformer/config.json": _json_bytes(finished.student.to_wan_config()),
        "transformer/diffusion_pytorch_model.safetensors": weights,
        **{f"vae/{name}": content for name, content in _vae_files(finished.assets_dir / "vae")},
    })  # fmt: skip
    if text_encoder is not None:
        for part in TEXT_PARTS:
            if copy:
                shutil.copytree(text_encoder / part, out / part)
            else:
                os.symlink((text_encoder / part).resolve(), out / part)


def _text_classes(text_encoder: Path | None) -> dict[str, Any]:
    """As the teacher's own folder names them; without one, whoever opens the pipeline passes embeddings."""
    if text_encoder is None:
        return {part: [None, None] for part in TEXT_PARTS}
    try:
        index = json.loads((text_encoder / "model_index.json").read_text(encoding="utf-8"))
        return {part: index[part] for part in TEXT_PARTS}
    except (OSError, ValueError, KeyError) as error:
        raise BadUsage(
            wrong="--text-encoder is no pipeline folder with a text encoder",
            found=f"{text_encoder}: {error!r}",
            mend="give the teacher's folder",
        ) from None


def _refuse_what_wan_pipeline_cannot_open(finished: Finished) -> None:
    config = json.loads((finished.assets_dir / "vae" / "config.json").read_text(encoding="utf-8"))
    if config.get("_class_name") != VAE_CLASS:
        raise Refused(
            wrong=f"WanPipeline opens latents of {VAE_CLASS} only",
            found=f"a set of {finished.contract.teacher} with {config.get('_class_name')}",
            mend="export --format wanlite",
        )


def _vae_files(vae_dir: Path) -> Iterator[tuple[str, Iterator[bytes] | bytes]]:
    """Under plain names: a pipeline is opened with one variant for all of its parts."""
    for path in sorted(vae_dir.iterdir()):
        name = path.name.replace(".fp16", "")
        if path.suffix == ".json":
            yield name, path.read_text(encoding="utf-8").replace(".fp16", "").encode()
        else:
            yield name, pieces(path)


def _refuse_what_comfyui_cannot_open(student: StudentConfig) -> None:
    """It derives the heads from the width, 128 channels each, and expects Wan's own timestep embedding."""
    if student.head_dim != COMFY_HEAD_DIM or student.freq_dim != COMFY_FREQ_DIM:
        raise BadUsage(
            wrong="ComfyUI opens Wan models of 128 channels a head and freq_dim 256 only",
            found=f"{student.head_dim} and {student.freq_dim}",
            mend="export --format diffusers, or train a student of such heads",
        )


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
