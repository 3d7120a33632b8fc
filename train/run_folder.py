"""The names on disk of a training run, and what can be said of one without torch.

run/ config.yaml  epochs/NNNN.json  checkpoints/<samples_seen>/  metrics.jsonl  log.txt  heartbeat.json  ranks/<r>/
"""

import json
from collections.abc import Iterator
from pathlib import Path

from common.errors import BadUsage
from common.log import METRICS_NAME
from common.watch import read_heartbeat

CONFIG_NAME, EPOCHS, CHECKPOINTS, RANKS = "config.yaml", "epochs", "checkpoints", "ranks"
STATE_NAME, MODEL_NAME, EMA_NAME, OPTIMIZER_NAME = (
    "state.json",
    "model.safetensors",
    "ema.safetensors",
    "optimizer.safetensors",
)


def checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in (run_dir / CHECKPOINTS).glob("[0-9]*") if path.is_dir())


def status_lines(run_dir: Path) -> Iterator[str]:
    """Where a run stands, from its folder alone."""
    beat = read_heartbeat(run_dir)
    if beat is None:
        raise BadUsage(wrong=f"{run_dir} is no run", found="no heartbeat", mend="give the `out` of a configuration")
    yield f"{run_dir}: {beat['state']} on {beat['host']}, step {beat.get('step', 0)}"
    yield f"checkpoints: {', '.join(folder.name for folder in checkpoints(run_dir)) or 'none yet'}"
    metrics = run_dir / METRICS_NAME
    if metrics.exists():
        last = json.loads(metrics.read_text().splitlines()[-1])
        yield f"step {last['step']}: loss {last['loss']:.4f}, {last['samples_per_s']:.0f} samples/s"
