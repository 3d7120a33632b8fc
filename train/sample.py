"""Pictures by a student, from texts and seeds that the set holds, beside the teacher's own.

    sheet = sample(run_dir, num=16, steps=20)              a PIL image

    the held-out records first -> noise of their own seeds -> the named grid, Euler, no guidance -> the set's VAE
    -> for each record the student's picture above the teacher's `final` from the same noise

The text encoder is not needed: the set holds the texts.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from common.config import load_config
from common.errors import BadUsage, Partial
from common.record import Record
from common.schedule import GRIDS, Grid, seeded_noise
from common.shards import ASSETS, ShardSet
from train.config import TrainConfig
from train.run_folder import CONFIG_NAME, EMA_NAME, STATE_NAME, checkpoints
from train.student import StudentConfig, WanLite
from train.vae import load_vae

GRID = "flow_match"
"""What the export's scheduler walks, too."""
GAP = 4


def sample(run_dir: Path, *, num: int, steps: int, device: str = "cpu") -> Image.Image:
    config = load_config(TrainConfig, run_dir / CONFIG_NAME)
    shards = ShardSet.open(config.set)
    student = newest_student(run_dir).to(device)
    records = pick_records(shards, num)
    grid = GRIDS[GRID](steps, shards.contract.shift, train_steps=shards.contract.train_steps)
    latents = draw(student, records, grid, torch.device(device))
    vae = load_vae(shards.path / ASSETS / "vae").to(device)
    finals = torch.from_numpy(np.stack([record.final for record in records]).astype(np.float32))
    with torch.inference_mode():
        mine, theirs = (pictures(vae.decode(part.to(device))) for part in (latents, finals))
    return sheet(mine, theirs)


def newest_student(run_dir: Path) -> WanLite:
    """The moving average of the newest checkpoint."""
    kept = checkpoints(run_dir)
    if not kept:
        raise BadUsage(wrong=f"{run_dir} has no checkpoint yet", found="an empty run", mend="train first")
    summary = json.loads((kept[-1] / STATE_NAME).read_bytes())
    student = WanLite(StudentConfig.from_dict(summary["student"]))
    student.load_state_dict(load_file(kept[-1] / EMA_NAME), strict=True)
    return student.eval()


def pick_records(shards: ShardSet, num: int) -> list[Record]:
    """Held-out records first, in the manifest's order; all of one size."""
    receipts = shards.manifest().receipts
    if not receipts:
        raise Partial(wrong=f"{shards.path} holds no record", found="0 receipts", mend="harvest first")
    size = receipts[0].height, receipts[0].width
    chosen = [
        (receipt, int(index))
        for held_out in (True, False)
        for receipt in receipts
        if (receipt.height, receipt.width) == size
        for index in np.flatnonzero(receipt.held_out_records() == held_out)
    ][:num]
    return [shards.read(receipt).record(index) for receipt, index in chosen]


@torch.inference_mode()
def draw(student: WanLite, records: list[Record], grid: Grid, device: torch.device) -> Tensor:
    """Latents [N, C, H, W] from each record's own noise and text."""
    noise = np.stack([seeded_noise(record.seed, record.final.shape) for record in records])
    text, lengths = _padded([record.text for record in records])
    state, text, lengths = torch.from_numpy(noise).to(device), text.to(device), lengths.to(device)
    for t, move in _moves(grid):
        velocity = student(state, torch.full((len(state),), t, device=device), text, lengths)
        state = state + move * velocity
    return state.cpu()


def pictures(pixels: Tensor) -> np.ndarray:
    """[N, 3, H, W] in -1..1 -> [N, H, W, 3] bytes."""
    scaled = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    out: np.ndarray = scaled.permute(0, 2, 3, 1).cpu().numpy()
    return out


def sheet(mine: np.ndarray, theirs: np.ndarray, *, columns: int = 8) -> Image.Image:
    """The student's pictures, each above its teacher's, `columns` pairs a row."""
    num, height, width, _ = mine.shape
    columns = min(columns, num)
    rows = -(-num // columns)
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (2 * height + 3 * GAP) + GAP), "white")
    for index in range(num):
        row, column = divmod(index, columns)
        left, top = GAP + column * (width + GAP), GAP + row * (2 * height + 3 * GAP)
        canvas.paste(Image.fromarray(mine[index]), (left, top))
        canvas.paste(Image.fromarray(theirs[index]), (left, top + height + GAP))
    return canvas


def _moves(grid: Grid) -> Iterator[tuple[float, float]]:
    for step in range(grid.num_steps):
        yield float(grid.timesteps[step]), float(grid.sigmas[step + 1] - grid.sigmas[step])


def _padded(texts: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    padded = np.zeros((len(texts), max(map(len, texts)), texts[0].shape[1]), np.float32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    return torch.from_numpy(padded), torch.tensor([len(text) for text in texts])
