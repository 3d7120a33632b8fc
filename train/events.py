"""A run's log: lines and metrics.jsonl, and the same numbers as TensorBoard events where they are asked for.

with run_log(config, run_dir, quiet=False) as log:
    log.metric(step=10, loss=0.31)          run_dir/tensorboard/: train/loss; event="held_out", gap=...: held_out/gap
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.log import Log
from train.config import TrainConfig

EVENTS = "tensorboard"
"""Under a run."""


@contextlib.contextmanager
def run_log(config: TrainConfig, run_dir: Path, *, quiet: bool) -> Iterator[Log]:
    """`quiet`: not the first of several processes, whose numbers are everybody's."""
    if quiet or not config.tensorboard:
        yield Log("train", run_dir, quiet=quiet)
        return
    log = EventLog("train", run_dir)
    try:
        yield log
    finally:
        log.close()


class EventLog(Log):
    """What is said about a step is written twice."""

    _writer: Any = None

    def metric(self, **numbers: Any) -> None:
        super().metric(**numbers)
        if "step" not in numbers:
            return
        if self._writer is None:
            assert self.run_dir is not None
            from torch.utils.tensorboard import SummaryWriter

            # What an earlier start wrote beyond its last checkpoint is said again, and hidden.
            self._writer = SummaryWriter(str(self.run_dir / EVENTS), purge_step=numbers["step"])
        for name, number in scalars(numbers):
            self._writer.add_scalar(name, number, numbers["step"])
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def scalars(numbers: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of one line, lists one by one; words have no curve."""
    for name, value in numbers.items():
        many = dict(enumerate(value)) if isinstance(value, list | tuple) else {"": value}
        for place, number in many.items():
            if name != "step" and isinstance(number, int | float) and not isinstance(number, bool):
                yield f"{numbers.get('event', 'train')}/{name}{place}", float(number)
