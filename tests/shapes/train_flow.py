"""Text encoder and transformer of the shapes teacher: flow matching on encoded scenes.

    latents.safetensors -> joint run (one transformer, text encoder with it) -> joint.safetensors
                        -> high run (t >= 875) and low run (t < 875), text encoder frozen -> high, low

x_t = (1 - s) x0 + s noise, the target is noise - x0, t = 1000 s (Lipman et al. 2022, arXiv 2210.02747; Wan 2.2 uses the
same). Levels are even in the shifted schedule that the scheduler walks, so each expert trains where it will serve.

The conditioning is the pipeline's: text padded with zero rows to 512, which are attended (tests/shapes/fast_attention).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from torch import Tensor
from transformers import UMT5EncoderModel

from tests.shapes.against_the_clock import Training, averaged
from tests.shapes.draw import parse
from tests.shapes.fast_attention import FastAttention, padding_bias, use_fast_attention
from tests.shapes.text import new_text_encoder, new_tokenizer

SHIFT, BOUNDARY = 3.0, 0.875
BATCH = 64
CAPTION_DROPOUT = 0.12
HARD = {("small", "star"): 4.0, ("small", "triangle"): 2.0, ("small", "cross"): 2.0, ("small", "heart"): 1.5}
"""What the experts get wrong is shown to them more often."""
CAPTION_TOKENS = 12
HIDDEN_SIZE = {"num_attention_heads": 4, "attention_head_dim": 48, "ffn_dim": 768, "num_layers": 6}


def new_transformer(text_width: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        **HIDDEN_SIZE, in_channels=16, out_channels=16, text_dim=text_width, freq_dim=256, rope_max_seq_len=1024
    )


def shifted(u: Tensor) -> Tensor:
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def unshifted(sigma: float) -> float:
    return sigma / (SHIFT - (SHIFT - 1) * sigma)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedScenes:
    """The pool of `train_vae.encode_pool` with its captions as tokens."""

    latents: Tensor  # fp16 [N, 16, h, w]
    tokens: Tensor  # int64 [N, 12]
    shares: np.ndarray  # [N], how often each is drawn while experts are trained: HARD ones more

    @classmethod
    def load(cls, path: Path) -> "EncodedScenes":
        with safe_open(path, "pt") as stored:
            captions = stored.metadata()["captions"].split("\n")
            latents = stored.get_tensor("latents")
        tokenizer = new_tokenizer()
        tokens = torch.tensor([tokenizer.encode(caption).ids for caption in captions])
        shares = np.array([HARD.get((scene.size, scene.shape), 1.0) for scene in map(parse, captions)])
        return cls(latents=latents, tokens=tokens, shares=shares / shares.sum())


def text_rows(encoder: UMT5EncoderModel, tokens: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """tokens [B, 12], dropped bool [B] -> rows [B, 13, D] (the last is padding) and how many of them are real [B]."""
    rows = encoder(tokens).last_hidden_state
    empty = torch.zeros_like(rows)
    empty[:, :1] = encoder(torch.ones(1, 1, dtype=torch.long)).last_hidden_state  # the empty prompt is one end token
    rows = torch.where(dropped[:, None, None], empty, rows)
    return torch.cat([rows, torch.zeros_like(rows[:, :1])], dim=1), torch.where(dropped, 1, CAPTION_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    clean: Tensor  # [B, 16, h, w]
    noise: Tensor  # [B, 16, h, w]
    tokens: Tensor  # [B, 12]
    dropped: Tensor  # bool [B]
    sigma: Tensor  # [B]


def make_batch(scenes: EncodedScenes, seed: int, step: int, low: float, high: float, *, hard: bool = False) -> Batch:
    """A function of (seed, step); the levels are spread evenly over the batch, low <= sigma <= high."""
    random = np.random.Generator(np.random.Philox(key=(seed << 32) + step))
    chosen = torch.from_numpy(random.choice(len(scenes.latents), size=BATCH, p=scenes.shares if hard else None))
    even = (np.arange(BATCH) + random.uniform(size=BATCH)) / BATCH
    u = unshifted(low) + (unshifted(high) - unshifted(low)) * torch.from_numpy(even).float()
    clean = scenes.latents[chosen].float()
    return Batch(
        clean=clean,
        noise=torch.from_numpy(random.standard_normal(clean.shape, dtype=np.float32)),
        tokens=scenes.tokens[chosen],
        dropped=torch.from_numpy(random.uniform(size=BATCH) < CAPTION_DROPOUT),
        sigma=shifted(u),
    )


def loss_of(transformer: WanTransformer3DModel, text: FastAttention, encoder: UMT5EncoderModel, b: Batch) -> Tensor:
    """Squared error of the predicted velocity; bf16 in the large products, weights and loss in fp32."""
    sigma = b.sigma[:, None, None, None]
    noisy = (1 - sigma) * b.clean + sigma * b.noise
    rows, num_tokens = text_rows(encoder, b.tokens, b.dropped)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text.bias = padding_bias(num_tokens, CAPTION_TOKENS)
        velocity = transformer(noisy.unsqueeze(2), 1000 * b.sigma, rows, return_dict=False)[0]
    return (velocity.float().squeeze(2) - (b.noise - b.clean)).square().mean()


def named(transformer: WanTransformer3DModel, encoder: UMT5EncoderModel) -> dict[str, torch.nn.Parameter]:
    parts = {"transformer": transformer, "text_encoder": encoder}
    return {f"{part}.{key}": value for part, model in parts.items() for key, value in model.named_parameters()}


def train_joint(work_dir: Path, minutes: float) -> Path:
    """One transformer over all levels, and the text encoder with it."""
    torch.manual_seed(0)
    encoder = new_text_encoder()
    transformer = new_transformer(encoder.config.d_model)
    start_gently(transformer)
    return _train("joint", transformer, encoder, work_dir, named(transformer, encoder), minutes, (0.0, 1.0))


def train_expert(work_dir: Path, name: str, minutes: float) -> Path:
    """`high` serves t >= 875, `low` the rest; both start from the joint run and leave the text encoder alone."""
    transformer, encoder = trained(work_dir / "joint.safetensors")
    encoder.requires_grad_(False)
    levels = (BOUNDARY, 1.0) if name == "high" else (0.0, BOUNDARY)
    parameters = {f"transformer.{key}": value for key, value in transformer.requires_grad_(True).named_parameters()}
    return _train(name, transformer, encoder, work_dir, parameters, minutes, levels)


def _train(
    name: str,
    transformer: WanTransformer3DModel,
    encoder: UMT5EncoderModel,
    work_dir: Path,
    parameters: dict[str, torch.nn.Parameter],
    minutes: float,
    levels: tuple[float, float],
) -> Path:
    joint = name == "joint"
    rates = {"peak_rate": 2e-3, "end_rate": 3e-4} if joint else {"peak_rate": 1.5e-3, "end_rate": 0.0}
    matrices = frozenset(key for key, value in parameters.items() if ".blocks." in key and value.ndim == 2)
    training = Training(name, parameters, work_dir, minutes=minutes, matrices=matrices, **rates)
    scenes = EncodedScenes.load(work_dir / "latents.safetensors")
    text = use_fast_attention(transformer)
    compile_blocks(transformer)
    seed = {"joint": 21, "high": 22, "low": 23}[name]
    for step in training.steps():
        training.update(loss_of(transformer, text, encoder, make_batch(scenes, seed, step, *levels, hard=not joint)))
    return training.path


def compile_blocks(transformer: WanTransformer3DModel) -> None:
    """Where there is a C++ compiler: 0.43 instead of 0.60 s a step, for 20 s at the start."""
    if shutil.which("g++"):
        for block in transformer.blocks:
            block.compile()


@torch.no_grad()
def start_gently(transformer: WanTransformer3DModel) -> None:
    """Each block begins as the identity (gates at zero) and the whole predicts zero, as in DiT (arXiv 2212.09748)."""
    for block in transformer.blocks:
        block.scale_shift_table[:, [2, 5]] = 0
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    torch.nn.init.zeros_(transformer.condition_embedder.time_proj.weight)
    torch.nn.init.zeros_(transformer.condition_embedder.time_proj.bias)


def trained(path: Path, encoder_path: Path | None = None) -> tuple[WanTransformer3DModel, UMT5EncoderModel]:
    """Averaged weights of a run; an expert's text encoder is the joint run's."""
    encoder = new_text_encoder()
    transformer = new_transformer(encoder.config.d_model)
    for model, part, source in ((transformer, "transformer.", path), (encoder, "text_encoder.", encoder_path or path)):
        weights = {key.removeprefix(part): value for key, value in averaged(source).items() if key.startswith(part)}
        missing = model.load_state_dict(weights, strict=False).missing_keys
        assert not [key for key in missing if "embed_tokens" not in key], missing
    return transformer.eval().requires_grad_(False), encoder.eval().requires_grad_(False)
