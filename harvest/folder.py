"""What a diffusers folder holds, before a weight is read.

    resolved = resolve(folder, "auto")        components, files, variant per component: from model_index.json alone
    resolved.summary()                        one line: what would be read, how much

A variant says which files are read, a dtype what is computed. fp16 files are taken for a component that has them
(`auto`), never mixed without a word; pickled files are never opened.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import BadUsage
from common.log import human_bytes
from common.tensor_file import weight_files

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

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def kind(self) -> str:
        return "prepared" if self.prepared else self.variant or "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What a folder holds, before a weight is read."""

    folder: Path
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


def resolve(source: Path, variant: str) -> Resolved:
    """A folder, or the name of a hub repository that is in the local cache; nothing is fetched."""
    folder = source if (source / MODEL_INDEX).exists() else _cached(source)
    index = read_json(folder / MODEL_INDEX)
    scalars: dict[str, Any] = {}
    components = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if isinstance(value, list) and len(value) == 2:
            if value[0] is not None:
                components[name] = _component(folder, name, value[0], value[1], variant)
        else:
            scalars[name] = value
    return Resolved(folder=folder, pipeline=index.get("_class_name", "?"), scalars=scalars, components=components)


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
    """The newest snapshot of `organisation/name` in the hub's local cache."""
    name = str(source)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
        cache = Path(os.environ.get(HUB_CACHE, home / "hub")) / f"models--{name.replace('/', '--')}"
        found = sorted(cache.glob(f"snapshots/*/{MODEL_INDEX}"), key=lambda path: path.stat().st_mtime)
        if found:
            return found[-1].parent
    if (source / "high_noise_model").is_dir() or any(source.glob("*.pth")):
        raise BadUsage(
            wrong=f"{source} is in Wan's original layout",
            found="high_noise_model/ or .pth files",
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
