"""A folder that stock WanPipeline opens, whole or not at all: nothing is written before everything is found.

write_pipeline(finished, out, teacher_dir, copy=False)          the text encoder's weights by link, or copied
"""

import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from common.errors import BadUsage, Refused
from common.files import Content, pieces, write_folder
from common.seals import sound
from common.tensor_file import weight_files
from train.card import pipeline_use
from train.finished import Finished, with_time
from train.student.weights import FolderWeights
from train.vae.network import read_vae_values

TEXT_PARTS = ("text_encoder", "tokenizer")
VARIANTS, VARIANT = (None, "fp16"), ".fp16"
VAE_CLASS = "AutoencoderKLWan"
WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)


def write_pipeline(finished: Finished, out: Path, text_encoder: Path | None, *, copy: bool) -> None:
    vae = _vae_of(finished)
    classes = _text_classes(text_encoder)
    if text_encoder is not None:
        _require_text_parts(text_encoder)
    parts = {} if text_encoder is None else {part: dict(_plainly(text_encoder / part)) for part in TEXT_PARTS}
    texts = {f"{part}/{name}": _content(path) if copy or path.suffix == ".json" else path.resolve()
             for part in parts for name, path in parts[part].items()}  # fmt: skip
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
    told = finished.card(pipeline_use(finished.student, finished.objective, has_text_encoder=text_encoder is not None))
    files = {
        **texts,
        "model_index.json": _json_bytes(index),
        "README.md": told.encode(),
        "scheduler/scheduler_config.json": _json_bytes(scheduler),
        "transformer/config.json": _json_bytes(finished.student.to_wan_config()),
        "transformer/diffusion_pytorch_model.safetensors": weights,
        **{f"vae/{name}": _content(path) for name, path in _plainly(vae)},
    }
    try:
        write_folder(out, files)
    except OSError as error:
        if copy or error.errno not in WITHOUT_LINKS:
            raise
        raise BadUsage(wrong="--out is on a file system without links", found=f"{out}: {error.strerror}",
                       mend="add --copy") from None  # fmt: skip


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
            found=f"{text_encoder}: {error}",
            mend="give the teacher's folder",
        ) from None


def _require_text_parts(folder: Path) -> None:
    """An index that names a part does not mean that the part is there."""
    encoder = folder / "text_encoder"
    whole = {
        "text_encoder": (encoder / "config.json").is_file() and any(weight_files(encoder, kind) for kind in VARIANTS),
        "tokenizer": (folder / "tokenizer" / "tokenizer_config.json").is_file(),
    }
    missing = [part for part in TEXT_PARTS if not whole[part]]
    if missing:
        raise BadUsage(wrong="--text-encoder names a folder with parts missing",
                       found=f"no whole {' and no whole '.join(missing)} in {folder}",
                       mend="finish the download, or give another folder of the teacher")  # fmt: skip


def _vae_of(finished: Finished) -> Path:
    """The set's own, whole, of the one class that WanPipeline opens."""
    folder = sound(finished.assets_dir, "vae")
    config = read_vae_values(folder)
    if config.get("_class_name") != VAE_CLASS:
        raise Refused(
            wrong=f"WanPipeline opens latents of {VAE_CLASS} only",
            found=f"a set of {finished.contract.teacher} with {config.get('_class_name')}",
            mend="export --format wanlite",
        )
    FolderWeights(folder)  # what is missing or torn is named
    return folder


def _plainly(part_dir: Path) -> Iterator[tuple[str, Path]]:
    """A part's files under plain names, its weights of one variant, the plain one if it is there: a pipeline is opened
    with one variant for all of its parts."""
    variant = next((kind for kind in VARIANTS if weight_files(part_dir, kind)), None)
    chosen = weight_files(part_dir, variant)
    for path in sorted(part_dir.iterdir()):
        is_others = path.suffix == ".safetensors" and path not in chosen
        is_others |= ".index." in path.name and (VARIANT in path.name) != (variant is not None)
        if path.is_file() and not is_others:
            yield path.name.replace(VARIANT, ""), path


def _content(path: Path) -> Content:
    """An index names files."""
    return path.read_text(encoding="utf-8").replace(VARIANT, "").encode() if path.suffix == ".json" else pieces(path)


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
