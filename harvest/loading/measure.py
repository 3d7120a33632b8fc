"""A teacher's sizes from its files' headers, the machine at hand, and what the configuration wishes of both.

sizes = sizes_of(resolved, names, torch.bfloat16)        no weight is read
machine = machine_at_hand("auto")                        what is free now
wish = wish_of(config, needs)
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.errors import BadUsage
from harvest.config import TeacherConfig
from harvest.latents import TILE
from harvest.loading.folder import Component, Resolved
from harvest.loading.identity import tied_names
from harvest.loading.kernels import Ask
from harvest.loading.reading import Moved
from harvest.loading.weights import class_of, policy_dtype, stored_tensors
from harvest.placing.placement import MAP
from harvest.placing.places import VAE, Machine, Size, Wish, module_of, workers_here
from harvest.teacher import Work

TEXT_ENCODER = "text_encoder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Of the largest forward that will be asked for, beside the weights."""

    work_bytes: int = 0
    """Everything."""
    kept_bytes: int = 0
    """Of it, what each block keeps as long as a micro-batch is under way."""
    text_bytes: int = 0
    """Of it, the texts that a micro-batch brings."""
    tile_bytes: int | None = None
    """Of the VAE, at a picture's tile; None: no picture is encoded."""
    attention: tuple[Ask, ...] = ()


def sizes_of(
    resolved: Resolved, names: Sequence[str], dtype: torch.dtype, moved: Moved = lambda **_: None
) -> list[Size]:
    sizes = []
    for part in (resolved.components[name] for name in names):
        shapes = {name: stored.shape for name, stored in stored_tensors(part, moved).items()}
        sizes.append(size_of(part, shapes, class_of(part), dtype))
    return sizes


def size_of(part: Component, shapes: Mapping[str, tuple[int, ...]], model: Any, dtype: torch.dtype) -> Size:
    """`model`: the class or one of it; what is tied counts once."""
    tied = tied_names(model)
    modules: dict[str, int] = {}
    for name, shape in shapes.items():
        if name in tied and tied[name] in shapes:
            continue
        num_bytes = math.prod(shape) * policy_dtype(part, model, name, dtype).itemsize
        modules[module_of(name)] = modules.get(module_of(name), 0) + num_bytes
    order = sorted(modules, key=_natural)
    return Size(name=part.name, is_encoder=part.name == TEXT_ENCODER, modules={name: modules[name] for name in order})


def vae_sizes(resolved: Resolved, needs: Needs, moved: Moved = lambda **_: None) -> list[Size]:
    """The VAE in float32, where pictures are encoded (harvest/latents.py); it is loaded apart."""
    if needs.tile_bytes is None:
        return []
    return [
        replace(size, is_encoder=True, own_work=needs.tile_bytes)
        for size in sizes_of(resolved, [VAE], torch.float32, moved)
    ]


def tile_bytes(resolved: Resolved, work: Work) -> int | None:
    """What encoding a tile needs beside the VAE: some copies of the stream at its widest, which is at full size."""
    if not work.pictures:
        return None
    vae = resolved.components[VAE].config
    shrunk = vae.get("patch_size") or 1  # so many pixels a side come in as channels
    channels = vae["base_dim"] if "base_dim" in vae else vae["block_out_channels"][0]
    places = min(work.height, TILE) * min(work.width, TILE) // shrunk**2
    return int(places * 12 * (channels + shrunk**2) * 4)


def _natural(module: str) -> list[tuple[bool, int, str]]:
    """blocks.9 before blocks.10."""
    return [(word.isdigit(), int(word) if word.isdigit() else 0, word) for word in module.split(".")]


def machine_at_hand(device: str) -> Machine:
    """What is free to this process: its GPUs, and its share of the host's memory where several workers have it."""
    sharers = workers_here(os.environ)
    host = available_host_bytes() // sharers
    if device == "cpu" or not torch.cuda.is_available():
        return Machine(gpus={}, host=host)
    count = torch.cuda.device_count()
    wanted = torch.device(device).index if device != "auto" else None
    if wanted is not None:
        return Machine(
            gpus={f"cuda:{wanted}": torch.cuda.mem_get_info(wanted)[0]}, host=host if sharers > 1 else host // count
        )
    return Machine(gpus={f"cuda:{n}": torch.cuda.mem_get_info(n)[0] for n in range(count)}, host=host)


def available_host_bytes() -> int:
    """MemAvailable, or what the control group leaves."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else max(min(available, int(limit) - used), 0)


def wish_of(config: TeacherConfig, needs: Needs) -> Wish:
    told = config.placement
    if isinstance(told, str) and told.endswith(".json"):
        told = _read_map(Path(told))
    return Wish(
        strategy=told if isinstance(told, str) else MAP,
        modules={} if isinstance(told, str) else told,
        text_encoder=config.text_encoder,
        budget=config.memory_budget,
        work_bytes=needs.work_bytes,
        kept_bytes=needs.kept_bytes,
        text_bytes=needs.text_bytes,
        prepared=config.prepared is not None,
    )


def _read_map(path: Path) -> dict[str, str]:
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadUsage(
            wrong="teacher.placement names a file that cannot be read", found=f"{path}: {error}", mend="mend it"
        ) from None
    if not isinstance(told, dict) or not all(isinstance(device, str) for device in told.values()):
        raise BadUsage(wrong=f"{path} is no map of modules", found=str(told)[:80], mend='write {"module": "cuda:0"}')
    return told
