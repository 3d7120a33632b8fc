"""Low-rank adapters: put beside a student's layers to be trained, and added into its weights when they are.

    adapt(student, config.lora, seed=0)                       by peft; only the adapters want gradients
    weights = merged(base, adapters, config.lora)             plain tensors: W + alpha / rank x B A (2106.09685, eq. 3)
    files = adapter_files(adapters, config.lora)              a folder that peft opens beside the same base

Only training imports peft. What a checkpoint holds of such a run are the adapters: `base_digest` says beside which
weights they belong.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from common.errors import BadUsage, Refused
from common.files import pieces
from train.config import Lora
from train.student.network import WEIGHTS_NAME, WanLite

DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
"""How peft calls a layer's two matrices, under the name that it gives an adapter itself."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."


def adapt(student: WanLite, lora: Lora, *, seed: int) -> None:
    """In place. The first weights are a function of the seed and the layer's name; the student answers as before."""
    from peft import LoraConfig, inject_adapter_in_model

    _require_layers(student, lora)
    values = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    inject_adapter_in_model(values, student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.endswith((DOWN, UP)))
        if name.endswith(DOWN):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)


def merged(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """The sum in float64, so that it is rounded once."""
    weights = dict(base)
    for name in adapters:
        if name.endswith(DOWN):
            layer = name.removesuffix(DOWN)
            added = adapters[layer + UP].double() @ adapters[name].double()
            weight = weights[f"{layer}.weight"]
            weights[f"{layer}.weight"] = (weight.double() + lora.alpha / lora.rank * added).to(weight.dtype)
    return weights


def whole(saved: dict[str, Tensor], lora: Lora | None, init_dir: Path, digest: str | None) -> dict[str, Tensor]:
    """A student's own tensors, from what a checkpoint holds and, where that is adapters, the init beside."""
    if lora is None:
        return saved
    assert digest is not None
    require_base(init_dir, digest)
    return merged(load_file(init_dir / WEIGHTS_NAME), saved, lora)


def adapter_files(adapters: Mapping[str, Tensor], lora: Lora) -> dict[str, bytes]:
    """As peft's own `save_pretrained` lays them out."""
    config = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.targets),
              "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
              "task_type": None, "base_model_name_or_path": None}  # fmt: skip
    named = {ADAPTER_PREFIX + name.replace(".default.", "."): tensor for name, tensor in adapters.items()}
    return {
        ADAPTER_CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        ADAPTER_WEIGHTS: save(named, metadata={"format": "pt"}),
    }


def base_digest(init_dir: Path) -> str:
    """Of the weights that a run begins with, or that adapters stand beside."""
    digest = hashlib.sha256()
    for piece in pieces(init_dir / WEIGHTS_NAME):
        digest.update(piece)
    return digest.hexdigest()


def require_base(init_dir: Path, digest: str) -> None:
    if not (init_dir / WEIGHTS_NAME).is_file():
        raise BadUsage(wrong="the init that these adapters were trained beside is gone",
                       found=f"no {init_dir / WEIGHTS_NAME}", mend="put it back there")  # fmt: skip
    if base_digest(init_dir) != digest:
        raise Refused(
            wrong="the init is not the one that these adapters were trained beside",
            found=f"{init_dir / WEIGHTS_NAME} of other weights, it was sha256 {digest[:16]}",
            mend="give the init that the run began with, or another `out`",
        )


def _require_layers(student: WanLite, lora: Lora) -> None:
    layers = [name for name, module in student.named_modules() if isinstance(module, nn.Linear)]
    for target in lora.targets:
        if not any(Lora(targets=(target,)).adapts(layer) for layer in layers):
            known = sorted({layer.removeprefix("blocks.0.") for layer in layers if layer.startswith("blocks.0.")})
            raise BadUsage(wrong=f"lora: no linear layer's name ends with '{target}'", found=", ".join(known),
                           mend="name one of these, or its last words")  # fmt: skip
