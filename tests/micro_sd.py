"""A micro Stable Diffusion 2.1: random weights in the true diffusers layout, for the second kind of teacher.

    folder = write_micro_sd(tmp_path / "sd")                                   # v_prediction, as 2.1 is
    folder = write_micro_sd(tmp_path / "sd15", prediction_type="epsilon")

Stock `StableDiffusionPipeline.from_pretrained(folder)` opens it; safety checker and feature extractor are absent parts.
"""

import json
from pathlib import Path
from typing import Any, Literal

from tests.micro import WORDS, built, save_part

TEXT_DIM = 32
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": (2, 4),
    "cross_attention_dim": TEXT_DIM,
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 64,
    "scaling_factor": 0.18215,
}


def write_micro_sd(
    folder: Path,
    *,
    prediction_type: Literal["v_prediction", "epsilon"] = "v_prediction",
    scheduler: Literal["DDIMScheduler", "PNDMScheduler"] = "DDIMScheduler",
    seed: int = 0,
    variant: str | None = None,
) -> Path:
    """Writes UNet, CLIP text encoder, KL autoencoder (4 channels, stride 8), tokenizer and scheduler."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    vocab_size = write_micro_clip_tokenizer(folder / "tokenizer")
    clip = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=TEXT_DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=TEXT_DIM,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=0,
    )
    save_part(built(lambda: UNet2DConditionModel(**UNET), f"{seed}/unet"), folder / "unet", variant)
    save_part(built(lambda: CLIPTextModel(clip), f"{seed}/text_encoder"), folder / "text_encoder", variant)
    save_part(built(lambda: AutoencoderKL(**VAE), f"{seed}/vae"), folder / "vae", variant)
    _save_scheduler(folder / "scheduler", scheduler, prediction_type)
    return _write_model_index(folder, scheduler)


def _save_scheduler(folder: Path, kind: str, prediction_type: str) -> None:
    import diffusers

    options: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }
    options |= {"clip_sample": False} if kind == "DDIMScheduler" else {"skip_prk_steps": True}
    getattr(diffusers, kind)(**options).save_pretrained(folder)


def _write_model_index(folder: Path, scheduler: str) -> Path:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.35.0.dev0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def write_micro_clip_tokenizer(folder: Path) -> int:
    """Writes a CLIP tokenizer (vocab.json, merges.txt) over all bytes and WORDS; returns the size of its vocabulary."""
    vocab, merges = _byte_pairs()
    specials = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "!",
    }
    config = specials | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=2), encoding="utf-8")
    return len(vocab)


def _byte_pairs() -> tuple[dict[str, int], list[str]]:
    """Left-to-right merges that spell each word, over the 256 byte letters and their end-of-word forms."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = ["!", *sorted(set(ByteLevel.alphabet()) - {"!"})]
    pieces = letters + [f"{letter}</w>" for letter in letters]
    merges: list[str] = []
    for word in WORDS:
        spelled = [*word[:-1], f"{word[-1]}</w>"]
        while len(spelled) > 1:
            merge, joined = f"{spelled[0]} {spelled[1]}", spelled[0] + spelled[1]
            if merge not in merges:
                merges.append(merge)
                pieces.append(joined)
            spelled[:2] = [joined]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges
