"""What may change between a checkpoint and the run that goes on from it.

allow(config, facts, contract=..., epoch=..., log=log)        says what changed, refuses what would mix two runs
require_contract(folder, facts, contract)                     the set's alone, as whoever draws or exports asks
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import check
from common.errors import Refused
from common.log import Log
from train.config import TrainConfig

HARMLESS = frozenset({
    "set", "init", "out",  # places: the set's meaning and each epoch's content are compared by digest
    "batch_size", "gradient_checkpointing", "sharded_optimizer", "ema_on_host", "compile", "fit",
    "device", "processes", "threads",
    "reader", "read_workers", "on_corrupt", "deadline_s",
    "checkpoint_every", "keep_checkpoints", "keep_every", "log_every", "tensorboard",
    "save_samples", "sample_interval", "sample_dir", "sample_prompts",
})  # fmt: skip
"""How and where, not what: they change no number of the run, or last bits of it."""


def allow(config: TrainConfig, facts: dict[str, Any], *, contract: str, epoch: int, epoch_digest: str,
          log: Log) -> None:  # fmt: skip
    require_contract(config.out, facts, contract)
    if facts["epoch_digest"] != epoch_digest:
        raise Refused(
            wrong=f"epoch {epoch} is not the one that the checkpoint was trained on",
            found=f"another list of shards in {config.out}",
            mend="restore that folder, or start a new run",
        )
    changed = _difference(config, facts)
    harmful = {name: pair for name, pair in changed.items() if name not in HARMLESS}
    if harmful:
        raise Refused(
            wrong=f"{config.out} was begun with another configuration (then | now)",
            found="; ".join(f"{name}: {then} | {now}" for name, (then, now) in harmful.items()),
            mend="set these back, or start a new run under another `out`",
        )
    if changed:
        log.say("the configuration changed", **{name: f"{then}->{now}" for name, (then, now) in changed.items()})


def require_contract(trained: Path, facts: Mapping[str, Any], contract: str) -> None:
    """Checkpoints of the first releases do not say it."""
    was = facts.get("contract", contract)
    if was != contract:
        raise Refused(
            wrong=f"{trained} was trained on a set of another contract",
            found=f"{contract[:16]}, was {was[:16]}",
            mend="give the set it was trained on, its contract.json as it was; or train into another `out`",
        )


def _difference(config: TrainConfig, facts: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    now = config.model_dump(mode="json")
    then = check(TrainConfig, facts["config"], source="the checkpoint's configuration").model_dump(mode="json")
    # What was derived at the first start and is now said aloud is no change.
    then["global_batch"] = facts["global_batch"]
    now["global_batch"] = now["global_batch"] or facts["global_batch"]
    return {name: (then[name], value) for name, value in now.items() if then[name] != value}
