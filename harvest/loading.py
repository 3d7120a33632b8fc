"""A diffusers folder into memory, and the certainty that all of it came.

    resolved = resolve(folder, "auto")        which components, which files: from model_index.json alone
    model = load_model(resolved, "transformer", dtype, device)
    fingerprint([model, ...])                 by content: fp32, sharded and prepared folders of one model agree

Loaders trust too much: a missing weight is a warning and a tensor on the meta device, an encoder without its
embeddings gets random ones. Here both are refused.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import BadUsage, Refused
from common.log import human_bytes

if TYPE_CHECKING:
    import torch

MODEL_INDEX = "model_index.json"
WEIGHT_STEMS = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    name: str
    library: str
    class_name: str
    config: dict[str, Any]
    variant: str | None
    """Which weight files are read; None: the plain ones."""
    weight_files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.weight_files)


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
            f"{part.name} {human_bytes(part.num_bytes)}{f' ({part.variant} files)' if part.variant else ''}"
            for part in self.components.values()
            if part.weight_files
        )
        return ", ".join(parts)


def resolve(folder: Path, variant: str) -> Resolved:
    """Which components a folder has and which files would be read; nothing is mixed silently."""
    index = _read_json(folder / MODEL_INDEX)
    scalars: dict[str, Any] = {}
    components = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if isinstance(value, list) and len(value) == 2 and value[0] is not None:
            components[name] = _component(folder, name, value[0], value[1], variant)
        elif not isinstance(value, list):
            scalars[name] = value
    return Resolved(folder=folder, pipeline=index["_class_name"], scalars=scalars, components=components)


def load_model(resolved: Resolved, name: str, dtype: "torch.dtype", device: str) -> Any:
    """A component's network, every tensor of it, in eval mode."""
    import importlib

    part = resolved.components[name]
    library = importlib.import_module(part.library)
    importlib.import_module(f"{part.library}.utils.logging").disable_progress_bar()  # ours says more
    model_class = getattr(library, part.class_name)
    dtype_word = "dtype" if part.library == "transformers" else "torch_dtype"
    try:
        model, report = model_class.from_pretrained(
            str(resolved.folder / name),
            variant=part.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **{dtype_word: dtype},
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise Refused(
            wrong=f"{name} cannot be loaded", found=str(error).splitlines()[0], mend=f"check {resolved.folder / name}"
        ) from error
    _require_whole(name, model, report)
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(resolved: Resolved) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(resolved.folder / "tokenizer"), local_files_only=True)


def fingerprint(models: Iterable[Any]) -> str:
    """sha256 over `model/name dtype shape sha256(bytes)` of all tensors, sorted by name."""
    import torch

    lines = []
    for number, model in enumerate(models):
        for name, tensor in model.state_dict().items():
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            digest = hashlib.sha256(data).hexdigest()
            lines.append(f"{number}/{name} {tensor.dtype} {'x'.join(map(str, tensor.shape))} {digest}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def fingerprint_files(paths: Iterable[Path]) -> str:
    """sha256 over the names and bytes of small files: a tokenizer's identity."""
    running = hashlib.sha256()
    for path in sorted(paths):
        running.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return running.hexdigest()


def _component(folder: Path, name: str, library: str, class_name: str, variant: str) -> Component:
    part_dir = folder / name
    if not part_dir.is_dir():
        raise BadUsage(wrong=f"{folder} lacks '{name}'", found=f"{MODEL_INDEX} names it", mend="copy the whole folder")
    config_path = part_dir / "config.json"
    config = _read_json(config_path) if config_path.exists() else {}
    if not config_path.exists():  # a tokenizer or a scheduler: no weights
        return Component(
            name=name, library=library, class_name=class_name, config=config, variant=None, weight_files=()
        )
    halves = _weight_files(part_dir, "fp16")
    plain = _weight_files(part_dir, None)
    use_half = bool(halves) and (variant == "fp16" or (variant == "auto"))
    files = halves if use_half else plain
    if not files or (variant == "fp16" and not use_half):
        there = sorted(path.name for path in part_dir.iterdir())
        raise BadUsage(
            wrong=f"{part_dir} has no {'fp16 ' if variant == 'fp16' else ''}safetensors weights",
            found=", ".join(there[:8]),
            mend="set teacher.variant: auto, or fetch the safetensors files (pickled .bin and .pth are never opened)",
        )
    return Component(
        name=name,
        library=library,
        class_name=class_name,
        config=config,
        variant="fp16" if use_half else None,
        weight_files=files,
    )


def _weight_files(part_dir: Path, variant: str | None) -> tuple[Path, ...]:
    """The single file, or all files that the index names; a named one that is missing is an error."""
    dot = f".{variant}" if variant else ""
    for stem in WEIGHT_STEMS:
        single = part_dir / f"{stem}{dot}.safetensors"
        if single.exists():
            return (single,)
        for index in (
            part_dir / f"{stem}.safetensors.index{dot}.json",
            part_dir / f"{stem}{dot}.safetensors.index.json",
        ):
            if index.exists():
                files = tuple(part_dir / name for name in sorted(set(_read_json(index)["weight_map"].values())))
                missing = [path.name for path in files if not path.exists()]
                if missing:
                    raise BadUsage(wrong=f"{index} names files that are missing", found=missing[0], mend="copy them")
                return files
    return ()


def _require_whole(name: str, model: Any, report: Any) -> None:
    missing = list(report["missing_keys"])
    meta = [key for key, tensor in model.state_dict().items() if tensor.is_meta]
    mismatched = list(report["mismatched_keys"])
    if missing or meta or mismatched:
        raise Refused(
            wrong=f"{name} did not load whole",
            found=f"missing {missing[:3]}, without data {meta[:3]}, of another shape {mismatched[:3]}",
            mend="fetch the component again: its files do not fit its config",
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        return values
    except OSError as error:
        raise BadUsage(
            wrong="the teacher's folder cannot be read", found=f"{path}: {error.strerror}", mend="set teacher.folder"
        ) from None
    except ValueError as error:
        raise BadUsage(wrong=f"{path} is not JSON", found=str(error), mend="copy the file again") from None
