"""One line per event that a person would want at 3 a.m.; numbers go to metrics.jsonl.

log = Log("harvest", run_dir)              run_dir None: lines only
log.say("item 3/12 committed", records=16, rate="8.1 rec/s")
log.metric(step=10, loss=0.31)             one JSON object a line, with the time
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from common.files import append_line

METRICS_NAME, LOG_NAME = "metrics.jsonl", "log.txt"


class Log:
    """Lines for people on stderr (and run_dir/log.txt), numbers for programs in run_dir/metrics.jsonl."""

    def __init__(self, name: str, run_dir: Path | None = None, *, quiet: bool = False) -> None:
        self.name, self.run_dir, self._quiet = name, run_dir, quiet
        if run_dir is not None:
            run_dir.mkdir(parents=True, exist_ok=True)

    def say(self, event: str, **facts: Any) -> None:
        line = " ".join(
            [time.strftime("%H:%M:%S"), self.name, event, *(f"{key}={value}" for key, value in facts.items())]
        )
        if not self._quiet:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        if self.run_dir is not None:
            append_line(self.run_dir / LOG_NAME, line)

    def metric(self, **numbers: Any) -> None:
        if self.run_dir is not None:
            line = json.dumps({"time": round(time.time(), 3), **numbers}, allow_nan=True)
            append_line(self.run_dir / METRICS_NAME, line)


def gpu_label(*, index: int, uuid: str, rank: int) -> str:
    """How a log line names a GPU: an index alone means nothing under CUDA_VISIBLE_DEVICES."""
    return f"gpu{index}[{uuid.removeprefix('GPU-')[:8]}] rank{rank}"


def human_bytes(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def human_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{seconds:.1f}s"
