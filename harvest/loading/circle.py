"""Workers of one machine that load one teacher at the same time: the first reads, the others receive from it.

    circle = join(config, device, what, ...)           None where this process loads alone; `what` is the same for all
    circle.give("transformer", tensors, notes)         the first: to everybody, in one order
    notes, tensors = circle.take("transformer", make)  the others
    circle.leave()                                     no process group is left: once loaded, nobody needs another

    first    read part 1 | read part 2 -> broadcast 1 | read part 3 -> broadcast 2 ...     (NCCL; gloo on a CPU)
    others   build part 1 ...          <- receive 1

Who was started by one parent (the supervisor, torchrun, srun) and is told of neighbours meets in a file below the
temporary folder. Who comes late (started again) loads alone. Whoever dies or falls silent is named by those who wait.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import Fault, Refused
from common.files import write_atomic
from common.log import Log
from common.watch import Watch
from harvest.config import TeacherConfig
from harvest.placing.places import workers_here

JOIN_S, SILENT_S, LOOK_S = 120.0, 600.0, 0.02
GROUP_S = 120.0
"""Of torch's own patience: when it is asked for anything, everybody is ready."""
PULSE_S = 1.0
AT_ONCE = 64
"""Tensors under way before any of them is waited for."""
TOGETHER, ALONE = "together", "alone"
Notes = dict[str, Any]
Make = Callable[[str, torch.dtype, tuple[int, ...]], Tensor]


class Circle:
    """One of them. `give`, `take` and `leave` are called from one thread, in the order of the parts."""

    def __init__(self, store: Any, rank: int, pids: list[int], device: str, moved: Callable[..., None]) -> None:
        self._store, self.rank, self._pids, self._device, self._moved = store, rank, pids, device, moved
        self._group_is_made, self._part, self._is_closed = False, "the beginning", False

    def give(self, part: str, tensors: Mapping[str, Tensor], notes: Notes) -> None:
        self._part = part
        told = {name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in tensors.items()}
        self._store.set(f"{part}/told", json.dumps({"tensors": told, "notes": notes}))
        self._await(part, {f"{part}/ready/{rank}": pid for rank, pid in enumerate(self._pids) if rank}, self._pids)
        self._broadcast(part, list(tensors.values()))

    def take(self, part: str, make: Make) -> tuple[Notes, dict[str, Tensor]]:
        """make: an empty tensor by name, dtype and shape, for it to arrive in."""
        self._part = part
        self._await(part, {f"{part}/told": self._pids[0]}, self._pids)
        told = json.loads(self._store.get(f"{part}/told"))
        tensors = {name: make(name, getattr(torch, dtype), tuple(shape))
                   for name, (dtype, *shape) in told["tensors"].items()}  # fmt: skip
        self._store.set(f"{part}/ready/{self.rank}", b"1")
        self._broadcast(part, list(tensors.values()))
        return told["notes"], tensors

    def pulse(self) -> None:
        """The first one still reads."""
        self._store.add("pulse", 1)

    def look(self) -> None:
        """From any thread that waits: a library's call that never returns cannot look for itself."""
        if not self._is_closed:
            self._require_alive(self._part, self._pids)

    def leave(self) -> None:
        """When all have what they came for: who comes from now on loads alone."""
        path = _meeting_place()
        write_atomic(_marker_of(path), b"")
        if self._group_is_made:
            self._store.set(f"left/{self.rank}", b"1")
            self._await("the end", {f"left/{rank}": pid for rank, pid in enumerate(self._pids)}, ())
            self._is_closed = True
            dist.destroy_process_group()
            self._group_is_made = False
        self._is_closed = True
        if self._store.add("gone", 1) == len(self._pids):
            path.unlink(missing_ok=True)

    def _await(self, part: str, keys: Mapping[str, int], living: Collection[int]) -> None:
        """Until all keys are there; or one of those who must live or owe them is gone, or was silent for too long."""
        heard_at, pulse = time.monotonic(), 0
        while missing := {key: pid for key, pid in keys.items() if not self._store.check([key])}:
            self._require_alive(part, {*living, *missing.values()})
            beat = self._store.add("pulse", 0)
            if beat != pulse:
                heard_at, pulse = time.monotonic(), beat
                self._moved(loading=part, file="read by another worker")
            if time.monotonic() - heard_at > SILENT_S:
                self._break(part, f"worker {', '.join(map(str, missing.values()))} was silent for {SILENT_S:.0f} s")
            time.sleep(LOOK_S)

    def _broadcast(self, part: str, tensors: list[Tensor]) -> None:
        try:
            self._send(part, tensors)
        except RuntimeError as error:
            time.sleep(10 * LOOK_S)  # who broke it off may not be gone yet
            self._require_alive(part, self._pids)
            self._break(part, str(error).split("\n")[0])

    def _send(self, part: str, tensors: list[Tensor]) -> None:
        if not self._group_is_made:
            backend = "nccl" if self._device.startswith("cuda") else "gloo"
            store = dist.PrefixStore("group", self._store)  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=len(self._pids),
                                    timeout=timedelta(seconds=GROUP_S))  # fmt: skip
            self._group_is_made = True
        for start in range(0, len(tensors), AT_ONCE):
            works = [dist.broadcast(tensor, src=0, async_op=True) for tensor in tensors[start : start + AT_ONCE]]
            deadline = time.monotonic() + SILENT_S
            for work in works:
                # Looked at, not waited for: a wait for somebody who is gone has no end.
                while not work.is_completed():
                    self._require_alive(part, self._pids)
                    if time.monotonic() > deadline:
                        self._break(part, f"a broadcast among {self._pids} did not end within {SILENT_S:.0f} s")
                    time.sleep(LOOK_S / 20)
                work.wait()
            self._moved(loading=part)

    def _require_alive(self, part: str, pids: Collection[int]) -> None:
        gone = sorted(pid for pid in pids if not is_alive(pid))
        if gone:
            self._break(part, f"worker {', '.join(map(str, gone))} is gone")

    def _break(self, part: str, found: str) -> None:
        if self._group_is_made and self._device.startswith("cuda"):
            dist.distributed_c10d._abort_process_group()  # its kernel would turn for ever
        self._group_is_made, self._is_closed = False, True
        raise Fault(wrong=f"the workers' common load broke off at {part}", found=found,
                    mend="start it again: who comes late loads alone; or set teacher.broadcast: false")  # fmt: skip


def join(config: TeacherConfig, device: str, what: Mapping[str, Any], watch: Watch, moved: Callable[..., None],
         log: Log) -> Circle | None:  # fmt: skip
    """what: all that must be the same for everybody; who has something else makes everyone load alone."""
    count = workers_here(os.environ)
    if not config.broadcast or count == 1:
        return None
    path = _meeting_place()
    store = None if _marker_of(path).exists() else dist.FileStore(str(path), -1)  # type: ignore[attr-defined]
    rank = count if store is None else store.add("joined", 1) - 1
    if store is None or rank >= count:
        log.say("broadcast: the others came before, this worker loads alone")
        return None
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.startswith("cuda") else f"none {rank}"
    store.set(f"who/{rank}", json.dumps({"pid": os.getpid(), "gpu": gpu, "what": what}, sort_keys=True))
    keys, deadline = [f"who/{number}" for number in range(count)], time.monotonic() + JOIN_S
    while not store.check(keys) and not store.check(["verdict"]) and time.monotonic() < deadline:
        watch.heed()
        time.sleep(LOOK_S)
    present = [json.loads(store.get(key)) for key in keys if store.check([key])]
    agree = all(one["what"] == present[0]["what"] for one in present)
    agree = agree and len({one["gpu"] for one in present}) == len(present)  # two of one GPU cannot form a group
    # One word for all, by whoever has it first: nobody waits for somebody who has gone his own way.
    verdict = store.compare_set("verdict", "", TOGETHER if agree and len(present) == count else ALONE)
    if verdict.decode() != TOGETHER:
        came = f"{len(present)} of {count} workers came" if len(present) < count else "another worker went alone"
        why = came if agree else "the workers do not load the same in the same way"
        log.say(f"broadcast: {why}, each loads alone")
        return None
    log.say(f"broadcast: this worker {'receives' if rank else 'reads'}, of {count}")
    return Circle(store, rank, [one["pid"] for one in present], device, moved)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _meeting_place() -> Path:
    """Of this parent's children: its number and when it began say which. In a folder that is this user's alone."""
    parent = os.getppid()
    began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    folder = Path(tempfile.gettempdir()) / f"wan-lite-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise Refused(wrong="others may write where this machine's workers meet", found=str(folder),
                      mend="remove it, or set TMPDIR to a folder of your own")  # fmt: skip
    return folder / f"load-{parent}-{began}"


def _marker_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-done")
