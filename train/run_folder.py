"""The names on disk of a training run, and what can be said of one without torch.

run/ config.yaml  epochs/NNNN.json  checkpoints/<samples_seen>/  metrics.jsonl  log.txt  heartbeat.json  ranks/<r>/
     samples/epoch_NNNN_sample_MM.png  watched.json  lock.json
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import BadUsage
from common.log import METRICS_NAME
from common.watch import read_heartbeat

CONFIG_NAME, EPOCHS, CHECKPOINTS, RANKS, SAMPLES = "config.yaml", "epochs", "checkpoints", "ranks", "samples"
LOCK_NAME, WATCHED_NAME = "lock.json", "watched.json"
STATE_NAME, MODEL_NAME, EMA_NAME, OPTIMIZER_NAME = (
    "state.json",
    "model.safetensors",
    "ema.safetensors",
    "optimizer.safetensors",
)


def checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in (run_dir / CHECKPOINTS).glob("[0-9]*") if path.is_dir())


def newest_or_given(source: Path) -> tuple[Path, Path]:
    """The run and the checkpoint that `source` means: a run's newest one, or one of its checkpoints itself."""
    found = checkpoints(source)
    folder = found[-1] if found else source
    run_dir = folder.parent.parent
    if not (run_dir / CONFIG_NAME).exists() or folder.parent.name != CHECKPOINTS:
        raise BadUsage(wrong=f"{source} has no checkpoint yet", found="neither a run that has one nor a checkpoint",
                       mend="train first, or give a run or one of its checkpoints")  # fmt: skip
    return run_dir, folder


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Without the lines that a full disk or a power loss has torn."""
    path = run_dir / METRICS_NAME
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def looks_at(run_dir: Path, step: int) -> set[str]:
    """Which looks at its student a run has come to after that step: held_out, pictures."""
    return {line["event"] for line in read_metrics(run_dir) if line.get("step") == step and "event" in line}


def status_lines(run_dir: Path) -> Iterator[str]:
    """Where a run stands, from its folder alone."""
    beat = read_heartbeat(run_dir)
    if beat is None:
        raise BadUsage(wrong=f"{run_dir} is no run", found="no heartbeat", mend="give the `out` of a configuration")
    yield f"{run_dir}: {beat['state']} on {beat['host']}, step {beat.get('step', 0)}"
    yield f"checkpoints: {', '.join(folder.name for folder in checkpoints(run_dir)) or 'none yet'}"
    lines = read_metrics(run_dir)
    steps = [line for line in lines if "loss" in line]
    if steps:
        last = steps[-1]
        loss = "none" if last["loss"] is None else f"{last['loss']:.4f}"
        yield f"step {last['step']}: loss {loss}, {last['samples_per_s']:.0f} samples/s"
    gaps = [line for line in lines if line.get("event") == "held_out"]
    if gaps:
        gap = "unknown" if gaps[-1]["gap"] is None else f"{gaps[-1]['gap']:.4f} of a mean's"
        yield f"held-out gap to the teacher at step {gaps[-1]['step']}: {gap}"
