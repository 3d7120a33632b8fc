"""Which share of the plan is a process's own: from `--slice i/n`, torchrun, srun or a Slurm array, else all of it.

    part = slice_of(os.environ, option)        a Slurm array of srun tasks: both count
    part.split(3)                              the shares of three workers on this machine

No collective operation: a share says only where a worker begins. It helps with the others' when its own is done.
"""

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from common.errors import BadUsage

LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
"""torchrun; srun. A batch script without srun has SLURM_NTASKS and is one process all the same."""
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Every `size`-th item of the shuffled plan, from the `rank`-th on."""

    rank: int = 0
    size: int = 1

    def __str__(self) -> str:
        return f"{self.rank}/{self.size}"

    def split(self, count: int) -> "list[Slice]":
        return [Slice(rank=self.rank + self.size * number, size=self.size * count) for number in range(count)]

    def holds(self, place: int) -> bool:
        return place % self.size == self.rank


WHOLE = Slice()


def parse_slice(text: str) -> Slice:
    parts = re.fullmatch(r"(\d+)/(\d+)", text)
    if parts is None or int(parts[1]) >= int(parts[2]):
        raise BadUsage(wrong="--slice", found=text, mend="say i/n with i from 0 to n - 1, for example 0/4")
    return Slice(rank=int(parts[1]), size=int(parts[2]))


def slice_of(environment: Mapping[str, str], option: str | None) -> Slice:
    """What was said on the command line, else what the launcher says."""
    if option is not None:
        return parse_slice(option)
    part = _array(environment)
    for rank, size in LAUNCHERS:
        if rank in environment and int(environment.get(size, "1")) > 1:
            return part.split(int(environment[size]))[int(environment[rank])]
    return part


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether somebody else starts a process for every device; an array of one task each does not."""
    return any(rank in environment and int(environment.get(size, "1")) > 1 for rank, size in LAUNCHERS)


def see_own_gpu(environment: MutableMapping[str, str]) -> None:
    """Under a launcher that shows every GPU to each of its processes: only ours is left. Before torch is imported."""
    local = next((int(environment[name]) for name in LOCAL_RANKS if name in environment), None)
    if local is None or not is_launched(environment):
        return
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        environment["CUDA_VISIBLE_DEVICES"] = str(local)
    elif 1 < len(names := visible.split(",")) > local:
        environment["CUDA_VISIBLE_DEVICES"] = names[local]


def _array(environment: Mapping[str, str]) -> Slice:
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return WHOLE
    number, first, step = (
        int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", "0"), ("MIN", "0"), ("STEP", "1"))
    )
    return Slice(rank=(number - first) // step, size=int(environment["SLURM_ARRAY_TASK_COUNT"]))
