"""The numbers of a training do not drift: 50 losses, written down once, from records and weights that are drawn."""

import json
from pathlib import Path

import numpy as np
import torch

from common.config import check
from common.shards import ShardSet
from tests.made import NUMERICS, made_contract, made_record
from train.config import TrainConfig
from train.dist import World
from train.loop import train
from train.run_folder import read_metrics
from train.student.network import StudentConfig, WanLite, save_student

GOLDEN = Path(__file__).parent / "golden_losses.json"
"""One machine repeats them to the bit. Another processor adds in another order: the tolerance is for that."""
TOLERANCE = 2e-3


def losses(folder: Path) -> list[float]:
    contract = made_contract(latent_channels=16, text_dim=32, latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16, keep=3)
    shards = ShardSet.create(folder / "set", contract)
    for first in (0, 6):
        shards.commit([made_record(first + number, contract) for number in range(6)], NUMERICS)
    size = StudentConfig(num_layers=2, num_heads=4, head_dim=12, in_channels=16, out_channels=16, patch=2, text_dim=32,
                         ffn_dim=96, freq_dim=32)  # fmt: skip
    save_student(folder / "init", size, drawn_weights(WanLite(size)))
    values = {"set": folder / "set", "init": folder / "init", "out": folder / "run", "batch_size": 4,
              "global_batch": 8, "num_epochs": 50 * 8 / 36, "warmup_steps": 5, "log_every": 1, "threads": 1,
              "device": "cpu"}  # fmt: skip
    train(check(TrainConfig, values, source="test"), World(rank=0, size=1, device=torch.device("cpu")))
    return [line["loss"] for line in read_metrics(folder / "run") if "loss" in line]


def drawn_weights(student: WanLite) -> dict[str, torch.Tensor]:
    """By numpy: its streams are the same everywhere."""
    rng = np.random.Generator(np.random.Philox(7))

    def drawn(name: str, tensor: torch.Tensor) -> torch.Tensor:
        spread = 0.1 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
        middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        return torch.from_numpy((middle + spread * rng.standard_normal(tensor.shape)).astype(np.float32))

    return {name: drawn(name, tensor) for name, tensor in student.state_dict().items()}


def test_fifty_losses_are_the_golden_ones(tmp_path: Path) -> None:
    np.testing.assert_allclose(losses(tmp_path), json.loads(GOLDEN.read_text()), rtol=TOLERANCE)
