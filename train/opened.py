"""A checkpoint beside the set and the init that it was trained with: whoever looks at one begins here.

    opened = open_checkpoint(run_or_checkpoint, EMA_NAME)      its configuration, its set, its weights, adapters merged

What it was trained as is said by the checkpoint, which is sealed; the run's config.yaml says where things lie today.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import check, load_config
from common.shards import ShardSet
from train.config import TrainConfig
from train.lora import whole
from train.resume import require_contract
from train.run_folder import CONFIG_NAME, newest_or_given
from train.state import verified
from train.student.config import StudentConfig
from train.student.weights import tensors_of

PLACES = ("set", "init", "out", "sample_dir")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    config: TrainConfig
    shards: ShardSet
    summary: dict[str, Any]
    """Its state.json."""
    saved: dict[str, Tensor]
    """What it holds: the student's tensors, or adapters alone."""
    weights: dict[str, Tensor]

    @property
    def student(self) -> StudentConfig:
        return StudentConfig.from_dict(self.summary["student"])


def open_checkpoint(source: Path, name: str) -> Opened:
    """`source`: a run (its newest), or one of its checkpoints; `name`: the raw weights or their average."""
    run_dir, folder = newest_or_given(source)
    summary = verified(folder, name)
    config = _config_of(run_dir, summary)
    shards = ShardSet.open(config.set)
    require_contract(folder, summary, shards.contract.digest())
    saved = dict(tensors_of(folder / name))
    weights = whole(saved, config.lora, config.init, summary.get("base"))
    return Opened(config=config, shards=shards, summary=summary, saved=saved, weights=weights)


def _config_of(run_dir: Path, summary: Mapping[str, Any]) -> TrainConfig:
    """Checkpoints of the first releases do not say it."""
    today = load_config(TrainConfig, run_dir / CONFIG_NAME)
    if "config" not in summary:
        return today
    trained = check(TrainConfig, summary["config"], source="the checkpoint's configuration")
    return trained.model_copy(update={name: getattr(today, name) for name in PLACES})
