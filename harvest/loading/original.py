"""Wan's original layout, read as it lies: its own tensor names and its own config.json, said in diffusers' words.

    high_noise_model/  low_noise_model/     Wan 2.2: config.json and safetensors each; Wan 2.1: in the folder itself
    common.wan_names says their tensors' names

What else a teacher needs (text encoder, tokenizer, VAE, scheduler) this layout keeps in pickles, which are never
opened: it comes from a diffusers folder of the same model family (`teacher.rest`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import BadUsage
from common.tensor_file import read_header

EXPERT_FOLDERS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
CLASS_NAME = "WanModel"


def expert_folders(folder: Path) -> dict[str, Path]:
    """The experts' folders of an original layout; {} where it is none."""
    pair = {name: folder / part for name, part in EXPERT_FOLDERS.items()}
    if any(path.is_dir() for path in pair.values()):
        return pair
    config = folder / "config.json"
    return {"transformer": folder} if config.is_file() and CLASS_NAME in config.read_text(encoding="utf-8") else {}


def diffusers_config(part_dir: Path, config: Mapping[str, Any], files: tuple[Path, ...]) -> dict[str, Any]:
    """What WanTransformer3DModel is built from; what config.json leaves to Wan's code is read from the shapes."""
    if config.get("_class_name") != CLASS_NAME or config.get("model_type") not in ("t2v", "ti2v"):
        raise BadUsage(
            wrong=f"{part_dir} holds no text-to-video expert",
            found=f"{config.get('_class_name')} of type {config.get('model_type')}",
            mend="take a t2v or ti2v model",
        )
    shapes = {name: stored.shape for path in files for name, stored in read_header(path).items()}
    try:
        patch, text = shapes["patch_embedding.weight"], shapes["text_embedding.0.weight"]
        return {
            "patch_size": list(patch[2:]),
            "num_attention_heads": config["num_heads"],
            "attention_head_dim": config["dim"] // config["num_heads"],
            "in_channels": config["in_dim"],
            "out_channels": config["out_dim"],
            "text_dim": text[1],
            "freq_dim": config["freq_dim"],
            "ffn_dim": config["ffn_dim"],
            "num_layers": config["num_layers"],
            "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
            "qk_norm": "rms_norm_across_heads" if "blocks.0.self_attn.norm_q.weight" in shapes else None,
            "eps": config["eps"],
            "rope_max_seq_len": 1024,
        }
    except KeyError as error:
        raise BadUsage(
            wrong=f"{part_dir} is not in Wan's original layout", found=f"no {error}", mend="take a diffusers folder"
        ) from None
