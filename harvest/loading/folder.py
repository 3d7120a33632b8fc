"""What a diffusers folder holds, before a weight is read.

    resolved = resolve(folder, "auto")        components, files, variant per component: from model_index.json alone
    resolved.summary()                        one line: what would be read, how much

A variant says which files are read, a dtype what is computed. fp16 files are taken for a component that has them
(`auto`), never mixed without a word; pickled files are never opened.
"""

import json
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import BadUsage
from common.log import human_bytes
from common.tensor_file import weight_files
from harvest.loading.original import EXPERT_FOLDERS, diffusers_config, expert_folders

MODEL_INDEX = "model_index.json"
HUB_CACHE = "HF_HUB_CACHE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    name: str
    library: str
    class_name: str
    folder: Path
    config: dict[str, Any]
    variant: str | None
    """Which weight files are read; None: the plain ones."""
    files: tuple[Path, ...]
    prepared: bool = False
    """The files are ours, in the dtypes that are computed in: mapped, not read."""
    original: bool = False
    """The files name their tensors as Wan's own code does (harvest/loading/original.py)."""
    crcs: Mapping[str, int] = field(default_factory=dict)
    """Tensor -> crc32c of what lies in the files, where that was written down."""

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def kind(self) -> str:
        return "prepared" if self.prepared else "original" if self.original else self.variant or "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What a folder holds, before a weight is read."""

    folder: Path
    """Where model_index.json and what it names lie; the experts of an original layout lie elsewhere."""
    pipeline: str
    scalars: dict[str, Any]
    """Facts that stand in model_index.json beside the components."""
    components: dict[str, Component]

    def summary(self) -> str:
        parts = (
            f"{part.name} {human_bytes(part.num_bytes)} ({part.kind} files)"
            for part in self.components.values()
            if part.files
        )
        return ", ".join(parts)


def resolve(source: Path, variant: str, rest: Path | None = None) -> Resolved:
    """A folder, or the name of a hub repository that is in the local cache; nothing is fetched.

    rest: the diffusers folder that gives what Wan's original layout lacks.
    """
    if not (source / MODEL_INDEX).exists() and (experts := expert_folders(source)):
        return _resolve_original(source, experts, variant, rest)
    return _resolve_folder(source, variant)


def _resolve_folder(source: Path, variant: str, without: Container[str] = ()) -> Resolved:
    folder = source if (source / MODEL_INDEX).exists() else _cached(source)
    index = read_json(folder / MODEL_INDEX)
    scalars: dict[str, Any] = {}
    components = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if isinstance(value, list) and len(value) == 2:
            if value[0] is not None and name not in without:
                components[name] = _component(folder, name, value[0], value[1], variant)
        else:
            scalars[name] = value
    return Resolved(folder=folder, pipeline=index.get("_class_name", "?"), scalars=scalars, components=components)


def _resolve_original(source: Path, experts: dict[str, Path], variant: str, rest: Path | None) -> Resolved:
    """The experts from here, everything else from `rest`, whose own experts are not looked at."""
    pickles = [path for path in source.rglob("*.pth") if path.parent in experts.values()]
    if rest is None or (pickles and not any(any(path.glob("*.safetensors")) for path in experts.values())):
        raise BadUsage(
            wrong=f"{source} is in Wan's original layout",
            found="its text encoder and VAE are pickles (.pth), which are never opened",
            mend="set teacher.rest to a diffusers folder with text_encoder, tokenizer, vae and scheduler, or take the "
            "same model in diffusers format (its name ends in -Diffusers)",
        )
    other = _resolve_folder(rest, variant, without=EXPERT_FOLDERS)
    found = {name: _original_expert(name, part_dir) for name, part_dir in experts.items()}
    return Resolved(
        folder=other.folder, pipeline=other.pipeline, scalars=other.scalars, components=other.components | found
    )


def _original_expert(name: str, part_dir: Path) -> Component:
    config = read_json(part_dir / "config.json")
    variant, files = _choose(part_dir, "none")
    return Component(
        name=name,
        library="diffusers",
        class_name="WanTransformer3DModel",
        folder=part_dir,
        config=diffusers_config(part_dir, config, files),
        variant=variant,
        files=files,
        original=True,
    )


def _component(folder: Path, name: str, library: str, class_name: str, variant: str) -> Component:
    part_dir = folder / name
    if not part_dir.is_dir():
        raise BadUsage(wrong=f"{folder} lacks '{name}'", found=f"{MODEL_INDEX} names it", mend="copy the whole folder")
    config_path = part_dir / "config.json"
    has_weights = config_path.exists()  # a tokenizer and a scheduler have none
    config = read_json(config_path) if has_weights else {}
    chosen, files = _choose(part_dir, variant) if has_weights else (None, ())
    return Component(
        name=name,
        library=library,
        class_name=class_name,
        folder=part_dir,
        config=config,
        variant=chosen,
        files=files,
    )


def _choose(part_dir: Path, variant: str) -> tuple[str | None, tuple[Path, ...]]:
    """The variant of one component, and its files."""
    halves, plain = weight_files(part_dir, "fp16"), weight_files(part_dir, None)
    if variant == "fp16" or (variant == "auto" and halves):
        chosen, files = "fp16", halves
    else:
        chosen, files = None, plain
    if not files:
        there = ", ".join(sorted(path.name for path in part_dir.iterdir())[:8])
        kind = "fp16 " if variant == "fp16" else ""
        raise BadUsage(
            wrong=f"{part_dir} has no {kind}safetensors weights",
            found=there,
            mend="set teacher.variant: auto, or fetch its safetensors files (pickled .bin and .pth are never opened)",
        )
    return chosen, files


def _cached(source: Path) -> Path:
    """The snapshot of `organisation/name` in the hub's local cache that its main branch is at; else the newest."""
    name = str(source)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
        cache = Path(os.environ.get(HUB_CACHE, home / "hub")) / f"models--{name.replace('/', '--')}"
        found = sorted(cache.glob(f"snapshots/*/{MODEL_INDEX}"), key=lambda path: path.stat().st_mtime)
        main = cache / "refs" / "main"
        at_main = [path for path in found if main.is_file() and path.parent.name == main.read_text().strip()]
        if found:
            return (at_main or found)[-1].parent
    if any(source.glob("*.pth")):
        raise BadUsage(
            wrong=f"{source} holds pickled weights",
            found=".pth files, which are never opened",
            mend="take the same model in diffusers format (its name ends in -Diffusers)",
        )
    raise BadUsage(
        wrong="there is no teacher",
        found=f"no {source / MODEL_INDEX}, and no such repository in the hub's cache",
        mend="set teacher.folder to a diffusers folder",
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
    except OSError as error:
        raise BadUsage(
            wrong="the teacher's folder cannot be read", found=f"{path}: {error.strerror}", mend="set teacher.folder"
        ) from None
    except ValueError as error:
        raise BadUsage(wrong=f"{path} is not JSON", found=str(error), mend="copy the file again") from None
    return values


def scheduler_told(settings: dict[str, Any]) -> str:
    """A scheduler's class and settings in one line; what only its library's version changes is left out."""
    own = {name: value for name, value in settings.items() if not name.startswith("_")}
    return f"{settings['_class_name']} {json.dumps(own, sort_keys=True)}"
