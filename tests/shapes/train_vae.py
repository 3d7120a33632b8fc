"""The VAE of the shapes teacher: trained flat, on drawn scenes.

    python -m tests.shapes.train_vae --work out/teacher --minutes 20

Three quarters of the time goes to 64-pixel crops around the shape, where the edges are, the rest to whole pictures.
The loss is |d| + d^2 + 0.001 KL; the KL term matters twice: it lets channels that are not needed fall silent, and the
noise that it leaves on the latents teaches the decoder to draw clean edges from latents that are a little wrong.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.shapes.against_the_clock import Training, averaged
from tests.shapes.draw import PIXELS, Scene, draw, training_scenes
from tests.shapes.flat_vae import decode, encode, flatten, new_vae, restart_convolutions

CROP, CROPS_PER_STEP, PICTURES_PER_STEP = 64, 32, 8
KL_WEIGHT = 1e-3
NUM_DRAWN = 6000
LATENT_NOISE, STARS = 0.35, 3
DECODER_STEPS_FROM = 1_000_000  # its batches are others than those of the first run


def drawn_pool(count: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    """Training scenes and their pictures, uint8 [count, 128, 128, 3]; every scene comes up equally often."""
    known = training_scenes()
    random = np.random.Generator(np.random.Philox(key=seed))
    order = np.concatenate([random.permutation(len(known)) for _ in range(-(-count // len(known)))])[:count]
    chosen = [known[i] for i in order]
    return chosen, np.stack([draw(scene, seed=(seed << 32) + i) for i, scene in enumerate(chosen)])


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, 1, H, W] in -1..1, channels last in memory."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1).unsqueeze(2)


def batch(pool: np.ndarray, step: int, crops: bool) -> Tensor:
    random = np.random.Generator(np.random.Philox(key=(11 << 32) + step))
    chosen = pool[random.integers(len(pool), size=CROPS_PER_STEP if crops else PICTURES_PER_STEP)]
    return to_tensor(np.stack([crop_near_shape(picture, random) for picture in chosen]) if crops else chosen)


def crop_near_shape(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    rows, columns = np.nonzero((picture != picture[0, 0]).any(-1))
    middle = np.array([rows.mean(), columns.mean()]) + random.uniform(-CROP / 2, CROP / 2, 2)
    top, left = np.clip(middle - CROP / 2, 0, PIXELS - CROP).astype(int)
    return picture[top : top + CROP, left : left + CROP]


def loss_of(
    vae: AutoencoderKLWan, pictures: Tensor, kl_weight: float, seed: int, spread: Tensor | None = None
) -> Tensor:
    """`spread` [C]: of the latents; up to LATENT_NOISE of it is added to them, another share for each picture."""
    mean, log_variance = encode(vae, pictures)
    generator = torch.Generator().manual_seed(seed)
    latents = mean + torch.randn(mean.shape, generator=generator) * (0.5 * log_variance).exp()
    if spread is not None:
        share = LATENT_NOISE * torch.rand(len(mean), 1, 1, 1, 1, generator=generator)
        latents = latents + share * spread.view(1, -1, 1, 1, 1) * torch.randn(mean.shape, generator=generator)
    off = decode(vae, latents) - pictures
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return off.abs().mean() + off.square().mean() + kl_weight * kl


def train_vae(work_dir: Path, minutes: float) -> Path:
    vae = flatten(new_vae())
    restart_convolutions(vae, seed=0)
    vae.to(memory_format=torch.channels_last)
    parameters = {key: value for key, value in vae.named_parameters() if "time_conv" not in key}
    training = Training("vae", parameters, work_dir, minutes=minutes, peak_rate=2e-3, weight_decay=0.0)
    pool = drawn_pool(NUM_DRAWN, seed=1)[1]
    for step in training.steps():
        pictures = batch(pool, step, crops=training.progress < 0.75)
        training.update(loss_of(vae, pictures, KL_WEIGHT * min(1.0, step / 500), seed=step))
    return training.path


def train_decoder(work_dir: Path, minutes: float) -> Path:
    """The decoder again, its encoder at rest: the latents that were encoded stay true. It sees them as a little wrong
    as the transformer's will be, and stars more often: they are what it got wrong."""
    vae = trained_vae(work_dir).to(memory_format=torch.channels_last)
    own = ("decoder.", "post_quant_conv.")
    parameters = {
        key: value.requires_grad_(True)
        for key, value in vae.named_parameters()
        if key.startswith(own) and "time_conv" not in key
    }
    training = Training("decoder", parameters, work_dir, minutes=minutes, peak_rate=1e-3, weight_decay=0.0)
    scenes, pictures = drawn_pool(NUM_DRAWN, seed=1)
    pool = pictures[np.repeat(np.arange(NUM_DRAWN), [STARS if scene.shape == "star" else 1 for scene in scenes])]
    spread = load_file(work_dir / "latents.safetensors")["std"]
    for step in training.steps():
        chosen = batch(pool, DECODER_STEPS_FROM + step, crops=training.progress < 0.8)
        training.update(loss_of(vae, chosen, 0.0, seed=DECODER_STEPS_FROM + step, spread=spread))
    return training.path


def trained_vae(work_dir: Path) -> AutoencoderKLWan:
    """The flat network with its averaged weights, the later decoder if there is one."""
    vae = flatten(new_vae())
    for name in ("vae", "decoder"):
        if (work_dir / f"{name}.safetensors").exists():
            vae.load_state_dict(averaged(work_dir / f"{name}.safetensors"), strict=False)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_pool(work_dir: Path, count: int, seed: int = 2, per_step: int = 32) -> Path:
    """Latents of many scenes, once: `latents` fp16 [count, 16, 16, 16] normalised, their captions, mean and std."""
    vae = trained_vae(work_dir)
    known, pictures = drawn_pool(count, seed)
    encoded = [encode(vae, to_tensor(pictures[i : i + per_step])) for i in range(0, count, per_step)]
    means = torch.cat([mean for mean, _ in encoded]).squeeze(2)
    variances = torch.cat([log_variance for _, log_variance in encoded]).squeeze(2).exp()
    # The spread counts the posterior's own: a silent channel then stays near zero instead of being blown up.
    mean, std = means.mean((0, 2, 3)), (means.var((0, 2, 3)) + variances.mean((0, 2, 3))).sqrt()
    latents = ((means - mean[:, None, None]) / std[:, None, None]).half().contiguous()
    captions = "\n".join(scene.caption for scene in known)
    path = work_dir / "latents.safetensors"
    save_file({"latents": latents, "mean": mean, "std": std}, path, metadata={"captions": captions})
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="train the VAE of the shapes teacher")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    print(train_vae(arguments.work, arguments.minutes))
