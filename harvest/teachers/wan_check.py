"""Whether a loaded Wan is the one that it says it is: asked once for files that were not seen before.

    odd = doubts(teacher, resolved, heed)        "" or what is odd, for a warning

One prompt is encoded twice: the same rows, bit for bit. Four drawn pictures are encoded by the folder's VAE, noised to
a high and a low level, and each expert predicts the velocity in one step: the expert for high noise is, compared with
the other, better at the high level than at the low one. Swapped files have the right names and shapes, and draw mush.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from common.schedule import seeded_noise
from harvest.loading.folder import Resolved
from harvest.loading.weights import load_model
from harvest.teacher import Teacher

SIDE = 128
HIGH_SIGMA, LOW_SIGMA = 0.99, 0.7
MARGIN = 1.1
"""Nearer than this nobody can tell; experts trained apart differ by 1.3 and more."""
PALETTE = ((0.7, 0.7, 0.2), (-0.6, -0.5, 0.4), (0.5, -0.3, -0.6), (-0.2, 0.6, -0.1), (-0.8, -0.6, 0.6))


class Asked(Teacher, Protocol):
    """A teacher whose experts can be asked one by one."""

    def predict_with(
        self, number: int, latents: Tensor, timesteps: Tensor, condition: Any
    ) -> tuple[Tensor, Tensor]: ...


@torch.inference_mode()
def doubts(teacher: Asked, resolved: Resolved, heed: Callable[[], None]) -> str:
    first, second = (teacher.encode(["a red circle on white"])[0] for _ in range(2))
    if not torch.equal(first, second):
        return "the text encoder gives another answer to the same question: sets will not repeat bit for bit"
    if teacher.facts.boundary is None or not LOW_SIGMA < teacher.facts.boundary < HIGH_SIGMA:
        return ""
    teacher.make_room()
    latents = _encoded(resolved, teacher.device, heed)
    texts = [teacher.encode([""])[0]] * len(latents)
    high, trivial = _errors(teacher, latents, texts, HIGH_SIGMA)
    low, _ = _errors(teacher, latents, texts, LOW_SIGMA)
    told = f"errors {high[0]:.2f} and {high[1]:.2f} at sigma {HIGH_SIGMA}, {low[0]:.2f} and {low[1]:.2f} at {LOW_SIGMA}"
    if max(min(high), min(low)) > trivial:
        return ""  # nothing here that denoises such pictures: no verdict
    if high[0] / high[1] > MARGIN * low[0] / low[1]:
        return f"transformer and transformer_2 look swapped ({told}): the first should be the one for high noise"
    return ""


def _errors(teacher: Asked, latents: Tensor, texts: list[Tensor], sigma: float) -> tuple[list[float], float]:
    """Mean squared error of each expert's velocity, and of the answer zero."""
    noise = torch.stack([torch.from_numpy(seeded_noise(n, latents.shape[1:])) for n in range(len(latents))])
    noise = noise.to(latents.device)
    fed, velocity = (1 - sigma) * latents + sigma * noise, noise - latents
    timesteps = torch.full((len(latents),), sigma * teacher.facts.train_steps)
    condition = teacher.condition(texts, texts[0])
    found = []
    for number in range(2):
        cond, _ = teacher.predict_with(number, fed, timesteps, condition)
        found.append(float((cond - velocity).square().mean()))
    return found, float(velocity.square().mean())


def _encoded(resolved: Resolved, device: str, heed: Callable[[], None]) -> Tensor:
    """The drawn pictures in the latent space that the teacher works in."""
    part = resolved.components["vae"]
    vae = load_model(part, torch.float32, heed=heed).to(device)
    latents = vae.encode(_pictures().unsqueeze(2).to(device)).latent_dist.mode().squeeze(2)
    mean, std = (torch.tensor(part.config[key], device=device).view(1, -1, 1, 1)
                 for key in ("latents_mean", "latents_std"))  # fmt: skip
    normed: Tensor = (latents - mean) / std
    return normed


def _pictures() -> Tensor:
    """[4, 3, SIDE, SIDE] in -1..1: discs and boxes of one colour on another."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")
    drawn = []
    for n in range(4):
        inside = (x - 0.1 * n) ** 2 + (y + 0.1 * n) ** 2 < 0.25 if n % 2 else (x.abs() < 0.5) & (y.abs() < 0.4)
        ink, paper = (torch.tensor(PALETTE[at]).view(3, 1, 1) for at in (n + 1, n))
        drawn.append(torch.where(inside, ink, paper))
    return torch.stack(drawn)
