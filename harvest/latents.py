"""Pictures into the space that the teacher works in, by the VAE of its folder.

    pictures = open_pictures(config, contract, resolved, teacher, moved, watch.heed)
    states = pictures.latents(item)                 key -> [C, H, W], normalised by the folder's latent mean and std
    pictures.faults(item)                           of those that could not be read, by name

In float32 whatever the teacher computes in, never under autocast: a half VAE leaves marks that a student learns. A
picture beyond TILE is encoded in overlapping tiles of that side, faded into each other: memory and time are bounded by
the tile, and `moved` is called after each one, so that a deadline has something to count; `heed` while the VAE comes
from the disk. Up to TILE it is one tile, and bit for bit what the stock VAE says. The mode of the VAE's distribution is
taken: nothing is drawn.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.record import Contract
from harvest.config import HarvestConfig, ImagesConfig
from harvest.images import pictures_of
from harvest.loading.folder import Resolved
from harvest.loading.weights import load_model
from harvest.plan import WorkItem
from harvest.quarantine import Fault
from harvest.running.health import UNREADABLE
from harvest.teacher import Teacher

Moved = Callable[[], None]
TILE, OVERLAP = 512, 128
"""Pixels; multiples of every stride."""


def open_pictures(config: HarvestConfig, contract: Contract, resolved: Resolved, teacher: Teacher, moved: Moved,
                  heed: Moved) -> "Pictures | None":  # fmt: skip
    """With source images alone."""
    if config.images is None:
        return None
    return Pictures(config.images, contract, resolved, teacher, moved, heed)


class Pictures:
    """Loaded once a worker; on the device only while an item is encoded, for the teacher's plan has no room for it."""

    def __init__(
        self, images: ImagesConfig, contract: Contract, resolved: Resolved, teacher: Teacher, moved: Moved, heed: Moved
    ) -> None:
        self._images, self._facts, self._device, self._moved, self._heed = (
            images, teacher.facts, teacher.device, moved, heed)  # fmt: skip
        self._by_profile = bool(contract.vae)  # sets from before either was minded go on as they began
        self._part = resolved.components["vae"]
        self._reasons: dict[str, str] = {}

    @cached_property
    def _vae(self) -> Any:
        return load_model(self._part, torch.float32, heed=self._heed)

    def latents(self, item: WorkItem) -> dict[str, Tensor]:
        """Of those that can be read."""
        keys: dict[str, list[str]] = {}
        seeds = {question.picture: question.seed for question in item.questions}
        for question in item.questions:
            keys.setdefault(question.picture, []).append(question.key)
        states: dict[str, Tensor] = {}
        self._vae.to(self._device)
        try:
            found_ones = pictures_of(self._images, seeds, item.height, item.width, by_profile=self._by_profile)
            for name, found in found_ones:
                if isinstance(found, str):
                    self._reasons |= dict.fromkeys(keys[name], f"picture {name}: {found}")
                    continue
                state = self._encoded(found)
                states |= dict.fromkeys(keys[name], state)
        finally:
            self._vae.to("cpu")
        return states

    def faults(self, item: WorkItem) -> list[Fault]:
        """For the quarantine; each is told once."""
        keys = [question.key for question in item.questions if question.key in self._reasons]
        return [{"key": key, "what": UNREADABLE, "where": self._reasons.pop(key)} for key in keys]

    @torch.inference_mode()
    def _encoded(self, image: Any) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1  # [3, H, W]
        # TF32 is what cuDNN makes of float32 unless told otherwise: ten bits, where this is to be exact.
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with exact, torch.autocast(torch.device(self._device).type, enabled=False):
            raw = encode_in_tiles(self._vae, pixels.to(self._device), self._facts.latent_stride, self._moved)
        mean, std = (torch.tensor(numbers).view(-1, 1, 1)
                     for numbers in (self._facts.latent_mean, self._facts.latent_std))  # fmt: skip
        return (raw.cpu() - mean) / std


def encode_in_tiles(vae: Any, pixels: Tensor, stride: int, moved: Moved) -> Tensor:
    """[3, H, W] in -1..1 -> [C, H / stride, W / stride]."""
    rows, columns = (_spans(length, stride) for length in pixels.shape[1:])
    total, weight = torch.zeros(()), torch.zeros(())
    for top, bottom in rows:
        for left, right in columns:
            piece = _encode(vae, pixels[None, :, top:bottom, left:right])
            moved()
            if len(rows) == len(columns) == 1:
                return piece
            if not total.ndim:
                size = (pixels.shape[1] // stride, pixels.shape[2] // stride)
                total, weight = piece.new_zeros(len(piece), *size), piece.new_zeros(size)
            place = slice(top // stride, bottom // stride), slice(left // stride, right // stride)
            fade = _fade(piece.shape[1], stride, piece)[:, None] * _fade(piece.shape[2], stride, piece)
            total[:, *place] += fade * piece
            weight[place] += fade
    return total / weight


def _encode(vae: Any, pixels: Tensor) -> Tensor:
    if "Wan" in type(vae).__name__:  # a video of one frame
        frame: Tensor = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[0, :, 0]
        return frame
    latents: Tensor = vae.encode(pixels).latent_dist.mode()[0]
    return latents


def _spans(length: int, stride: int) -> list[tuple[int, int]]:
    """Evenly over the length, at multiples of the stride, each OVERLAP or more into the next."""
    if length <= TILE:
        return [(0, length)]
    count = -(-(length - OVERLAP) // (TILE - OVERLAP))
    starts = [number * (length - TILE) // (count - 1) // stride * stride for number in range(count)]
    return [(start, start + TILE) for start in starts]


def _fade(size: int, stride: int, like: Tensor) -> Tensor:
    """Weights of a tile's rows: rising from its edges over the overlap. At a picture's edge it divides out."""
    index = torch.arange(size, device=like.device)
    return torch.minimum(index + 1, size - index).clamp(max=OVERLAP // stride).to(like.dtype)
