"""Pictures by a student, from texts and seeds that the set holds, beside the teacher's own.

    sheet = sample(run_dir, num=16, steps=20)              a PIL image

    the held-out records first -> noise of their own seeds -> the walk of the student's objective, Euler, no guidance
    -> the set's VAE -> for each record the student's picture above the teacher's `final` from the same noise

The text encoder is not needed: the set holds the texts.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.record import Record
from common.schedule import Grid, seeded_noise
from common.seals import sound
from common.shards import ASSETS, ShardSet
from train.chosen import first_records
from train.config import TrainConfig
from train.dist import HOST
from train.guidance import Answer, said
from train.objective import Objective, objective_of
from train.opened import open_checkpoint
from train.run_folder import EMA_NAME
from train.student.network import WanLite
from train.vae.network import load_vae

GAP = 4
BATCH = 64
"""Pictures that are walked and decoded together."""


class Trained(NamedTuple):
    """What a run's folder says of its student."""

    config: TrainConfig
    shards: ShardSet
    objective: Objective
    student: WanLite
    step: int
    samples_seen: int

    def answer(self, guidance: float | None) -> Answer:
        """The student as its walk asks it; `guidance` is for one that is told of it, None: the set's own."""
        return said(self.student, self.objective.drawn, guidance)


def open_run(source: Path, device: torch.device = HOST) -> Trained:
    """The moving average of a run's newest checkpoint, or of the one given, and the set it was trained on."""
    opened = open_checkpoint(source, EMA_NAME)
    student = WanLite(opened.student)
    student.load_state_dict(opened.weights, strict=True)
    objective = objective_of(opened.config, opened.shards.contract)
    return Trained(opened.config, opened.shards, objective, student.to(device).eval(), opened.summary["step"],
                   opened.summary["samples_seen"])  # fmt: skip


def sample(run_dir: Path, *, num: int, steps: int | None, device: torch.device = HOST,
           guidance: float | None = None) -> Image.Image:  # fmt: skip
    trained = open_run(run_dir, device)
    records = first_records(trained.shards, num)
    mine, theirs = pairs(trained.shards, trained.answer(guidance), records, trained.objective.grid(steps),
                         text_rows=trained.student.config.text_max_length, device=device)  # fmt: skip
    return sheet(mine, theirs)


def pairs(shards: ShardSet, student: Answer, records: Sequence[Record], grid: Grid, *, text_rows: int,
          device: torch.device) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The student's pictures and its teacher's, [N, H, W, 3] bytes each."""
    vae = load_vae(sound(shards.path / ASSETS, "vae")).to(device)
    mine, theirs = [], []
    for begin in range(0, len(records), BATCH):
        batch = records[begin : begin + BATCH]
        latents = draw(student, batch, grid, device, text_rows=text_rows)
        finals = torch.from_numpy(np.stack([record.final for record in batch]).astype(np.float32))
        with torch.inference_mode():
            mine.append(pictures(vae.decode(latents.to(device))))
            theirs.append(pictures(vae.decode(finals.to(device))))
    return np.concatenate(mine), np.concatenate(theirs)


@torch.inference_mode()
def draw(student: Answer, records: Sequence[Record], grid: Grid, device: torch.device, *,
         text_rows: int | None = None) -> Tensor:  # fmt: skip
    """Latents [N, C, H, W] from each record's own noise and text."""
    noise = np.stack([seeded_noise(record.seed, record.final.shape) for record in records])
    text, lengths = padded([record.text[:text_rows] for record in records])
    return drawn_from(student, torch.from_numpy(noise).to(device), text.to(device), lengths.to(device), grid)


def drawn_from(student: Answer, state: Tensor, text: Tensor, lengths: Tensor, grid: Grid) -> Tensor:
    """The walk of a grid from noise [N, C, H, W]; all on one device, the end on the CPU."""
    for t, move in _moves(grid):
        velocity = student(state, torch.full((len(state),), t, device=state.device), text, lengths)
        state = state + move * velocity
    return state.cpu()


def pictures(pixels: Tensor) -> np.ndarray:
    """[N, 3, H, W] in -1..1 -> [N, H, W, 3] bytes."""
    scaled = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    out: np.ndarray = scaled.permute(0, 2, 3, 1).cpu().numpy()
    return out


def sheet(mine: np.ndarray, theirs: np.ndarray) -> Image.Image:
    """The student's pictures, each above its teacher's."""
    gap = np.full((len(mine), GAP, *mine.shape[2:]), 255, np.uint8)
    return beside(np.concatenate([mine, gap, theirs], axis=1))


def beside(found: np.ndarray, *, columns: int = 8) -> Image.Image:
    """[N, H, W, 3] bytes on one canvas, row by row."""
    num, height, width, _ = found.shape
    columns = min(columns, num)
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, -(-num // columns) * (height + GAP) + GAP), "white")
    for index, picture in enumerate(found):
        row, column = divmod(index, columns)
        canvas.paste(Image.fromarray(picture), (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    return canvas


def padded(texts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """[N, L, D] float32 and [N]"""
    rows = np.zeros((len(texts), max(map(len, texts)), texts[0].shape[1]), np.float32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    return torch.from_numpy(rows), torch.tensor([len(text) for text in texts])


def _moves(grid: Grid) -> Iterator[tuple[float, float]]:
    for step in range(grid.num_steps):
        yield float(grid.timesteps[step]), float(grid.sigmas[step + 1] - grid.sigmas[step])
