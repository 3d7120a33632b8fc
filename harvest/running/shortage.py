"""When something has run out: memory or disk, said with what would help.

    with memory_told(config, resolved): ...         an error of the allocator becomes a table and three mends
    with disk_told(set_dir, num_bytes_left): ...    ENOSPC becomes exit code 3 and the bytes that are missing
    with_room(commit, deadline_s, stop, log)        before that: somebody may be making room

Nothing is changed silently: another micro-batch would be other numerics.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import Partial, Refused
from common.files import FULL
from common.log import Log, human_bytes, human_seconds
from common.stop import StopRequest
from harvest.config import HarvestConfig
from harvest.loading.folder import Resolved

ROOM_EVERY_S = 15.0
OF_THE_CPU = "DefaultCPUAllocator"


@contextlib.contextmanager
def memory_told(config: HarvestConfig, resolved: Resolved) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
        table = ", ".join(f"{what} {human_bytes(size)}" for what, size in _holders(resolved).items())
        raise Refused(wrong="out of memory", found=f"{reason}; held by: {table}", mend=_mends(config)) from error


@contextlib.contextmanager
def disk_told(set_dir: Path, num_bytes_left: Callable[[], int]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(set_dir).free
        raise Partial(
            wrong=f"no space left below {set_dir}",
            found=f"{human_bytes(free)} free, {human_bytes(num_bytes_left())} are still to be written",
            mend="make room, or carry what is there elsewhere (`python -m harvest push SET OUT --free`), and run again",
        ) from error


def with_room(write: Callable[[], object], deadline_s: float, stop: StopRequest, log: Log) -> None:
    """`write()`, which leaves nothing where it fails: again and again on a full disk, for so long or until asked to
    stop."""
    began, said = time.monotonic(), False
    while True:
        try:
            write()
            return
        except OSError as error:
            if error.errno not in FULL or stop.asked or time.monotonic() - began > deadline_s:
                raise
        if not said:
            with contextlib.suppress(OSError):  # it is full
                log.say(f"no space left: waiting for room, {human_seconds(deadline_s)} at most")
        said = True
        time.sleep(min(ROOM_EVERY_S, deadline_s))


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or OF_THE_CPU in str(error)


def _holders(resolved: Resolved) -> dict[str, int]:
    """Who has the memory, largest first: the allocator on a GPU, this process on a CPU; the weights as files."""
    import torch

    files = {name: sum(path.stat().st_size for path in part.files) for name, part in resolved.components.items()}
    held = {f"weights of {name} (as stored)": size for name, size in files.items() if size}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        mine, cached = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        held |= {"tensors, weights included,": mine, "kept by the allocator": cached - mine,
                 "others on this GPU": total - free - cached}  # fmt: skip
    else:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held |= {"this process": pages * 4096}
    return dict(sorted(held.items(), key=lambda entry: -entry[1]))


def _mends(config: HarvestConfig) -> str:
    """The cheapest first; each is another numerics or another size, so none is taken without being asked."""
    ways = []
    if config.micro_batch > 1:
        ways.append(f"--set micro_batch={config.micro_batch // 2}")
    if config.teacher.batched_guidance:
        ways.append("--set teacher.batched_guidance=false (half the activations, slower)")
    if config.teacher.dtype in ("auto", "float32"):
        ways.append("--set teacher.dtype=bfloat16 (half the weights)")
    ways.append(f"--set height={config.height // 2} --set width={config.width // 2} (another set)")
    return "one of " + "; ".join(ways[:3])
