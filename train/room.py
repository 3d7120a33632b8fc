"""Whether the disk has room for the checkpoints that a run will keep: said before its first step, not at 3 a.m.

    require_room(config, state, total_steps, log)

The newest `keep_checkpoints` and the one that is being written lie there at once; the first saves would still fit.
"""

import math
import shutil

from common.errors import Partial
from common.log import Log, human_bytes
from train.config import TrainConfig
from train.plan import checkpoint_bytes, moments
from train.run_folder import checkpoints
from train.state import TrainState, is_milestone


def require_room(config: TrainConfig, state: TrainState, total_steps: int, log: Log) -> None:
    disk, size = shutil.disk_usage(config.out), bytes_each(config, state)
    if not disk.total or state.step == total_steps:  # some network disks do not tell
        return
    there = sum(not is_milestone(folder, config.keep_every) for folder in checkpoints(config.out))
    to_come = math.ceil((total_steps - state.step) / config.checkpoint_every)
    more = max(1, min(config.keep_checkpoints + 1 - there, to_come))
    if more * size > disk.free:
        raise Partial(
            wrong=f"there is no space for {more} more checkpoints of {human_bytes(size)}",
            found=f"{human_bytes(disk.free)} free in {config.out}; keep_checkpoints: {config.keep_checkpoints}, "
            f"and one that is being written, less {there} that will go",
            mend=f"make {human_bytes(more * size - disk.free)} of room, or keep fewer (keep_checkpoints)",
        )
    milestones = num_milestones(config, state.step, total_steps)
    if (more + milestones) * size > disk.free:
        log.say(f"the disk will be full before the end: {milestones} checkpoints are kept for ever (keep_every)",
                each=human_bytes(size), free=human_bytes(disk.free))  # fmt: skip


def bytes_each(config: TrainConfig, state: TrainState) -> int:
    taught = {name: parameter.shape for name, parameter in state.student.named_parameters() if parameter.requires_grad}
    num_kept = sum(weight.numel() for weight in state.weights().values())
    return checkpoint_bytes(num_kept, moments(config, taught))


def num_milestones(config: TrainConfig, step: int, total_steps: int) -> int:
    """Of those to come, at steps that are saved."""
    if config.keep_every is None:
        return 0
    every = math.lcm(config.keep_every, config.checkpoint_every)
    return total_steps // every - step // every
