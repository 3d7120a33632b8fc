"""`harvest doctor CONFIG`: whether this machine, this disk and this folder are fit for a harvest. No weight is read.

for line in examine(config): ...        raises Refused at its end where something is not
"""

import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.claim import WITHOUT_LOCKS
from common.errors import Fault, Refused
from common.files import TEMPORARY_PREFIX, write_atomic
from common.log import human_bytes
from harvest.config import HarvestConfig

RELEASES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "zarr", "webdataset", "pillow", "safetensors")
PROBE_BYTES = 64_000_000
SLOW = 20e6
"""Bytes a second: a harvest writes about half of that for each GPU."""


def examine(config: HarvestConfig) -> Iterator[str]:
    found = ", ".join(f"{name} {_release(name)}" for name in RELEASES)
    yield f"python    {platform.python_version()} on {platform.platform()}"
    yield f"releases  {found}"
    yield from _devices(config)
    wrong = []
    folder = nearest_folder(config.out)
    stat = os.statvfs(folder)
    yield f"disk      {folder} on {_file_system(folder)}, {human_bytes(stat.f_bavail * stat.f_frsize)} free"
    try:
        speed = _write_speed(folder)
        yield f"writing   {human_bytes(speed)}/s, synced" + (": SLOW" if speed < SLOW else "")
        yield f"locks     {'kept' if _keeps_locks(folder) else 'NONE: leases alone keep two runs apart'}"
    except OSError as error:
        wrong.append(f"{folder} is not writable: {error.strerror}")
        yield f"writing   FAILS: {error.strerror}"
    try:
        from harvest.running.task import read_task
        from harvest.teacher import work_of
        from harvest.teachers import placement_of

        task = read_task(config)
        yield f"teacher   {task.resolved.summary()}"
        yield f"prompts   {task.plan.summary}"
        placement = placement_of(config.teacher, task.resolved, work_of(config, task.plan.sizes))
        yield from (f"placement {line}" for line in placement.lines())
    except Fault as fault:
        wrong.append(str(fault))
        yield f"teacher   FAILS: {fault}"
    if wrong:
        raise Refused(wrong=f"{len(wrong)} things stand in the way", found="; ".join(wrong), mend="see each of them")


def _devices(config: HarvestConfig) -> Iterator[str]:
    import torch

    from harvest.loading.measure import available_host_bytes
    from harvest.loading.parts import choose_device, choose_dtype, dtype_name

    yield f"cpu       {torch.get_num_threads()} threads of {os.cpu_count()}, {human_bytes(available_host_bytes())} free"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield f"gpu {index}     {name}, {human_bytes(free)} of {human_bytes(total)} free, CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        yield "gpu       none that torch sees"
    device = choose_device(config.teacher.device)
    yield f"computes  on {device} in {dtype_name(choose_dtype(config.teacher.dtype, config.teacher.device))}"


def _release(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "MISSING"


def _file_system(folder: Path) -> str:
    """Of the mount that holds it: the longest one."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(len(point), kind) for _, point, kind, *_ in mounts if folder.is_relative_to(point)]
    return max(holding)[1] if holding else "?"


def _write_speed(folder: Path) -> float:
    """By the seam that shards go through."""
    path = folder / f"{TEMPORARY_PREFIX}doctor-{os.getpid()}"
    try:
        began = time.monotonic()
        write_atomic(path, bytes(PROBE_BYTES))
        return PROBE_BYTES / (time.monotonic() - began)
    finally:
        path.unlink(missing_ok=True)


def _keeps_locks(folder: Path) -> bool:
    import fcntl

    path = folder / f"{TEMPORARY_PREFIX}doctor-lock-{os.getpid()}"
    try:
        with open(path, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(path, "rb") as other:
                try:
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        return False
    finally:
        path.unlink(missing_ok=True)


def nearest_folder(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
