"""What a worker does next: its own share of the plan, then what the others have not begun.

    for item in agenda(plan, shards, part, leases): ...; leases.release(item.id)

A lease (set/runs/leases/<item>.json) says that somebody is at an item; who holds it shows life by touching it. It is a
courtesy: two who work the same item compute the same bytes, and whoever commits first has committed it.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

from common.files import replace_quietly
from common.manifest import whole_receipt
from common.shards import MOVED, RUNS, ShardSet
from harvest.plan import Plan, WorkItem
from harvest.quarantine import note_of
from harvest.running.slices import Slice

LEASES = "leases"
SILENT_AFTER_S = 300.0
TOUCH_EVERY_S = 10.0
LOOK_EVERY_S = 1.0


class Leases:
    """Those of one process."""

    def __init__(self, set_dir: Path) -> None:
        self._folder = set_dir / RUNS / LEASES
        self._me = {"host": socket.gethostname(), "pid": os.getpid()}
        self._held: set[str] = set()
        self._touched_at = time.monotonic()

    def take(self, item: str) -> bool:
        """Ours from here on, unless somebody alive holds it."""
        if self.holder_alive(item):
            return False
        with contextlib.suppress(OSError):  # where no lease can be written, none is needed
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_quietly(self._path(item), json.dumps(self._me).encode())
        self._held.add(item)
        return True

    def touch(self) -> None:
        if time.monotonic() - self._touched_at < TOUCH_EVERY_S:
            return
        self._touched_at = time.monotonic()
        for item in tuple(self._held):
            with contextlib.suppress(OSError):
                os.utime(self._path(item))

    def release(self, item: str) -> None:
        self._held.discard(item)
        with contextlib.suppress(OSError):
            self._path(item).unlink()

    def sweep(self, shards: ShardSet) -> None:
        """What somebody left who was killed between his commit and his release."""
        for path in self._folder.glob("[!.]*.json"):
            if _is_done(path.stem, shards):
                self.release(path.stem)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for item in tuple(self._held):
            self.release(item)

    def holder_alive(self, item: str) -> bool:
        """Another one, that is, who touched it lately; on this host his process must be there too."""
        touched_at = self.touched_at(item)
        try:
            holder = json.loads(self._path(item).read_bytes())
            here, pid = holder["host"] == self._me["host"], holder["pid"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if holder == self._me or touched_at is None or time.time() - touched_at > SILENT_AFTER_S:
            return False
        return not here or Path(f"/proc/{pid}").exists()

    def touched_at(self, item: str) -> float | None:
        try:
            return self._path(item).stat().st_mtime
        except OSError:
            return None

    def _path(self, item: str) -> Path:
        return self._folder / f"{item}.json"


def agenda(
    plan: Plan, shards: ShardSet, part: Slice, leases: Leases, settle: Callable[[], None], wait: Callable[[float], None]
) -> Iterator[WorkItem]:
    """Our own items first; then the others', from their far end, where they come last. `settle` waits until what was
    given out is committed; `wait` sleeps, and may raise to stop."""
    held_by_others = []
    for item in plan.remaining(shards, part):
        if leases.holder_alive(item.id):
            held_by_others.append(item)
        else:
            yield from _free([item], shards, leases)
    settle()
    if part.size > 1:
        yield from _free(reversed(list(plan.remaining(shards))), shards, leases)
    for item in held_by_others:
        if _is_abandoned(item, leases, wait):
            yield from _free([item], shards, leases)
    settle()
    leases.sweep(shards)


def _free(items: Iterable[WorkItem], shards: ShardSet, leases: Leases) -> Iterator[WorkItem]:
    for item in items:
        if not _is_done(item.id, shards) and leases.take(item.id):
            yield item


def _is_abandoned(item: WorkItem, leases: Leases, wait: Callable[[float], None]) -> bool:
    """Ours by right, and held by somebody who may have died elsewhere: his silence tells, a touch tells otherwise."""
    while leases.holder_alive(item.id):
        before = leases.touched_at(item.id)
        wait(LOOK_EVERY_S)
        if leases.touched_at(item.id) not in (before, None):
            return False
    return True


def _is_done(item: str, shards: ShardSet) -> bool:
    """By now, not when the plan was made: committed, or what is good of it, under a name of its own."""
    if _is_committed(item, shards):
        return True
    note = note_of(shards.path, item)
    if note is None:
        return False
    if note.shard is not None:
        return _is_committed(note.shard, shards)
    return note.bad_keys >= set(note.walked)  # mended ones are asked for again once their shard is gone


def _is_committed(item: str, shards: ShardSet) -> bool:
    """Or carried elsewhere since: the note of it is written before the receipt goes, so it is looked for after it."""
    if whole_receipt(shards.receipt_path(item), f"{shards.shards_dir}/") is not None:
        return True
    return (shards.path / MOVED / f"{item}.json").exists()
