"""What tests make through the product's own doors: configurations, sets, records without a teacher."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.config import check
from common.record import Contract, Numerics, Record, record_key
from common.shards import RUNS
from harvest.config import HarvestConfig
from harvest.plan import Plan

ROOT = Path(__file__).parent.parent
PROMPTS = [f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("cat", "dog", "house", "sea")]


def harvest_config(out: Path, folder: Path, /, **changes: Any) -> HarvestConfig:
    prompts = out.parent / "prompts.txt"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    values: dict[str, Any] = {
        "out": out,
        "teacher": {"folder": folder, "device": "cpu", "dtype": "float32", "threads": 1},
        "prompts": {"file": prompts, "seeds_per_prompt": 2},
        "height": 64,
        "width": 64,
        "steps": 6,
        "keep": 3,
        "micro_batch": 3,
        "records_per_shard": 4,
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return check(HarvestConfig, values, source="test")


def harvest_here(config: HarvestConfig) -> Path:
    from harvest.running.loop import harvest

    harvest(config)
    return config.out


def trained_here(values: dict[str, Any], *, limit_s: float | None = None, **changes: Any) -> Path:
    """The run of a training in this process, alone; `values` and `changes`: keys of its configuration."""
    import torch

    from train.config import TrainConfig
    from train.dist import World
    from train.loop import train

    config = check(TrainConfig, values | changes, source="test")
    train(config, World(rank=0, size=1, device=torch.device("cpu")), limit_s=limit_s)
    return config.out


def planned(config: HarvestConfig) -> Plan:
    from harvest.loading.folder import resolve
    from harvest.plan import make_plan
    from harvest.teachers import facts_of

    return make_plan(config, facts_of(resolve(config.teacher.folder, config.teacher.variant)))


def write_student_json(path: Path, **changes: Any) -> Path:
    values = {
        "model_type": "WanLiteStudent",
        "hidden_size": 48,
        "depth": 2,
        "num_heads": 4,
        "num_channels": 16,
        "image_size": 64,
        "patch_size": 16,
        "text_max_length": 512,
        "text_encoder_output_dim": 32,
        "ffn_dim": 96,
        "freq_dim": 32,
    }
    path.write_text(json.dumps(values | changes), encoding="utf-8")
    return path


def tree(folder: Path, *, without: Sequence[str] = (RUNS,)) -> dict[str, str]:
    """Every file's digest: two folders are equal when their trees are."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in without
    }


def command(*words: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`python -m words...` as a user types it, in the repository."""
    return subprocess.run(_typed(words), cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=timeout)


def started(*words: str | Path) -> subprocess.Popen[bytes]:
    """The same, going on in the background."""
    null = subprocess.DEVNULL
    return subprocess.Popen(_typed(words), cwd=ROOT, env=_environment(), stdout=null, stderr=null)


def _typed(words: Sequence[str | Path]) -> list[str]:
    return [sys.executable, "-m", *map(str, words)]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def made_contract(**changes: Any) -> Contract:
    values: dict[str, Any] = {
        "teacher": "WanTransformer3DModel", "weights": "w", "text_encoder": "e", "tokenizer": "t",
        "text_cleaning": "c", "text_length": 512, "text_padding": "zeros", "text_dim": 8,
        "prediction": "flow", "noise": "flow",
        "train_steps": 1000, "shift": 3.0, "boundary": 0.875, "guidance": (4.0, 3.0), "negative_prompt": "",
        "latent_channels": 4, "latent_stride": 8, "latent_patch": 2, "latent_mean": (0.0,) * 4,
        "latent_std": (1.0,) * 4, "latent_dtype": "float16", "source": "trajectory", "solver": "euler",
        "jitter": True, "steps": 8, "keep": 2, "keep_at": (0,), "compute_dtype": "float32", "encoding": "float16",
    }  # fmt: skip
    return Contract(**(values | changes))


NUMERICS = Numerics(micro_batch=1, batched_guidance=True, collapsed_padding=False, attention="sdpa", device="cpu",
                    threads=1, torch="x", diffusers="y")  # fmt: skip


def made_record(number: int, contract: Contract | None = None, *, side: int = 64, zero: bool = False) -> Record:
    """A record of random arrays, the same ones for the same number."""
    contract = contract or made_contract()
    rng = np.random.default_rng(number)
    dtype = contract.storage_dtype
    latent = side // contract.latent_stride
    state = (contract.latent_channels, latent, latent)
    points = (contract.keep, *state)

    def array(*shape: int) -> Any:
        return np.zeros(shape, dtype) if zero else rng.standard_normal(shape).astype(dtype)

    prompt = f"prompt {number // 2}"
    text = np.full((3 + number // 2 % 5, contract.text_dim), number // 2, dtype)
    sigmas = np.sort(rng.random(contract.keep).astype(np.float32))[::-1].copy()
    fields = {name: array(*points) for name in contract.point_fields}
    return Record(key=record_key(prompt, number, side, side), prompt=prompt, seed=number, height=side, width=side,
                  text=text, timesteps=sigmas * np.float32(1000), sigmas=sigmas,
                  expert=(sigmas < 0.875).astype(np.uint8), final=array(*state), **fields)  # fmt: skip


def predicted_from(kind: str, x0: Any, noise: Any, a: Any, b: Any) -> Any:
    """What a perfect teacher of that kind says of a x0 + b noise."""
    return {"flow": noise - x0, "epsilon": noise, "v": a * noise - b * x0, "x0": x0}[kind]
