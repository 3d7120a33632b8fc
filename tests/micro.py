"""Micro teachers: tiny random weights in the true diffusers layouts, written to a folder in well under two seconds.

    folder = write_micro_wan(tmp_path / "wan")                   # Wan 2.2 T2V A14B: two experts, boundary 0.875
    folder = write_micro_wan(tmp_path / "wan21", experts=1)      # Wan 2.1: one model
    folder = write_micro_wan(tmp_path / "half", variant="fp16")  # *.fp16.safetensors with fp16 tensors
    folder = write_micro_ti2v(tmp_path / "ti2v")                 # Wan 2.2 TI2V 5B: 48 channels, stride 16

Stock `WanPipeline.from_pretrained(folder)` opens every one of them; so does our own loader, which is the point: tests
walk the road that a real teacher walks. Weights are drawn per tensor from (seed, part, name): every part's output is of
order one and depends visibly on the text and the timestep. The Stable-Diffusion form is in tests/micro_sd.py.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TEXT_DIM = 32
BOUNDARY_RATIO = 0.875
# Not T5TokenizerFast: transformers 5 rebuilds that class without byte fallback, whatever tokenizer.json says.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
WORDS = [
    *("a", "an", "the", "of", "on", "in", "and", "with", "small", "large"),
    *("red", "green", "blue", "yellow", "white", "black", "light", "dark"),
    *("circle", "square", "triangle", "star", "cat", "dog", "house", "tree", "sea", "sky", "photo", "painting"),
]

TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
VAE = {
    "base_dim": 4,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
TI2V_VAE = VAE | {
    "decoder_base_dim": 8,
    "z_dim": 48,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "latents_mean": [round(0.02 * (i - 24), 4) for i in range(48)],
    "latents_std": [round(0.4 + 0.01 * i, 4) for i in range(48)],
}


def write_micro_wan(
    folder: Path,
    *,
    experts: int = 2,
    seed: int = 0,
    variant: str | None = None,
    transformer: Mapping[str, Any] | None = None,
    flow_shift: float = 3.0,
    max_shard_size: str = "10GB",
) -> Path:
    """Writes a Wan 2.2 A14B (two experts) or Wan 2.1 (one) folder; `transformer` overrides TRANSFORMER's entries."""
    config = TRANSFORMER | dict(transformer or {})
    _write_parts(folder, config, VAE, experts, seed, variant, flow_shift, max_shard_size)
    two = experts == 2
    facts = {"boundary_ratio": BOUNDARY_RATIO if two else None, "expand_timesteps": False}
    return _write_model_index(folder, two, facts)


def write_micro_ti2v(
    folder: Path,
    *,
    seed: int = 0,
    variant: str | None = None,
    transformer: Mapping[str, Any] | None = None,
    flow_shift: float = 5.0,
    max_shard_size: str = "10GB",
) -> Path:
    """Writes a Wan 2.2 TI2V 5B folder: one model of 48 channels, residual VAE of stride 16, per-token timesteps."""
    config = TRANSFORMER | {"in_channels": 48, "out_channels": 48} | dict(transformer or {})
    _write_parts(folder, config, TI2V_VAE, 1, seed, variant, flow_shift, max_shard_size)
    return _write_model_index(folder, False, {"boundary_ratio": None, "expand_timesteps": True})


def _write_parts(
    folder: Path,
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
    experts: int,
    seed: int,
    variant: str | None,
    flow_shift: float,
    max_shard_size: str,
) -> None:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    vocab_size = write_micro_tokenizer(folder / "tokenizer")
    for name in ("transformer", "transformer_2")[:experts]:
        model = built(lambda: WanTransformer3DModel(**transformer), f"{seed}/{name}")
        save_part(model, folder / name, variant, max_shard_size=max_shard_size)
    umt5 = UMT5Config(
        vocab_size=vocab_size,
        d_model=transformer["text_dim"],
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
    )
    save_part(built(lambda: UMT5EncoderModel(umt5), f"{seed}/text_encoder"), folder / "text_encoder", variant)
    save_part(built(lambda: AutoencoderKLWan(**vae), f"{seed}/vae"), folder / "vae", variant)
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, num_train_timesteps=1000
    ).save_pretrained(folder / "scheduler")


def _write_model_index(folder: Path, two_experts: bool, facts: Mapping[str, Any]) -> Path:
    wan = ["diffusers", "WanTransformer3DModel"]
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.35.0.dev0",
        **facts,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", TOKENIZER_CLASS],
        "transformer": wan,
        "transformer_2": wan if two_experts else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def write_micro_tokenizer(folder: Path, model_max_length: int = 512) -> int:
    """Writes a T5-family tokenizer (unigram, byte fallback: no text is unknown); returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
    pieces += [("▁", -4.0)] + [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,"]
    pieces += [(f"▁{word}", -3.0 - 0.01 * i) for i, word in enumerate(WORDS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement="▁")])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = special | {"tokenizer_class": TOKENIZER_CLASS, "model_max_length": model_max_length}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")
    return tokenizer.get_vocab_size()


def built(make: Any, part: str) -> Any:
    """Makes a module and draws its weights; torch's global generator is left as it was found."""
    import torch

    with torch.random.fork_rng(devices=[]):
        model = make().eval()
    with torch.no_grad():
        draw_weights(model.named_parameters(), part)
    return model


def draw_weights(parameters: Iterable[tuple[str, Any]], part: str) -> None:
    """Matrices of gain one, gains near one, visible biases, modulation tables wide enough that no gate is closed.

    Cross-attention is sharpened (its query and key gains doubled), else a few words would drown in 512 padding rows.
    """
    import torch

    for name, parameter in parameters:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{part}/{name}".encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        if "scale_shift_table" in name:
            parameter.copy_(0.5 * noise)
        elif name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            parameter.copy_((2.0 if ".attn2.norm_" in name else 1.0) * (1.0 + 0.2 * noise))
        elif parameter.ndim == 1:
            parameter.copy_(0.1 * noise)
        elif "shared" in name or (name.endswith("embedding.weight") and parameter.ndim == 2):
            parameter.copy_(noise)
        else:
            parameter.copy_(noise / (parameter[0].numel() ** 0.5))


def save_part(model: Any, folder: Path, variant: str | None, **options: Any) -> None:
    """Saves one component; under `variant="fp16"` halved tensors in files that bear the variant's name."""
    model = model.half() if variant == "fp16" else model
    model.save_pretrained(folder, variant=variant, **options)
