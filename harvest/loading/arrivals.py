"""What is on its way from the disk, and whether it still moves.

    arrivals = Arrivals(watch, log, folders)
    arrivals.moved(loading="transformer", file=..., bytes_read=..., bytes_total=...)     from any thread
    model = arrivals.wait(future, "transformer")        says progress every few seconds; a file that blocks is named

Whoever waits hears a wish to stop, also while nothing moves. His wait is the watch's progress: what stands still
reaches the watch's deadline (stacks, state `stalled`), and before that a line here names component, file, file system,
the threads' states and the memory.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

from common.log import Log, human_bytes, human_seconds
from common.watch import Watch

TICK_S, SAY_S, QUIET_S = 0.1, 5.0, 20.0
T = TypeVar("T")


class Arrivals:
    def __init__(self, watch: Watch, log: Log, folders: Mapping[str, Path]) -> None:
        """folders: where each component lies, for the report."""
        self._watch, self._log, self._folders = watch, log, folders
        self.look: Callable[[], None] = lambda: None
        """Called while somebody waits; may raise."""
        self._facts: dict[str, dict[str, Any]] = {}
        self._began: dict[str, float] = {}
        self._changes = 0

    def moved(self, **facts: Any) -> None:
        now = time.monotonic()
        name = str(facts["loading"])
        self._began.setdefault(name, now)
        self._facts[name] = self._facts.get(name, {}) | facts
        self._changes += 1

    def wait(self, future: "Future[T]", name: str) -> T:
        """The result; meanwhile what is known is said."""
        seen, quiet_since, told_at = -1, time.monotonic(), time.monotonic()
        patience, bytes_told = QUIET_S, self._bytes()
        while not wait([future], TICK_S if quiet_since < time.monotonic() - TICK_S else TICK_S / 10).done:
            now = time.monotonic()
            self._watch.heed()
            self.look()
            if self._changes != seen:
                seen, quiet_since, patience = self._changes, now, QUIET_S
                self._watch.moved(**{"loading": name, **self._facts.get(name, {})})
            if now - quiet_since > patience:
                self._say_quiet(name, now - quiet_since, self._bytes() - bytes_told)
                patience, bytes_told = 2 * patience, self._bytes()
            elif now - told_at > SAY_S:
                told_at = now
                self._say_progress()
        return future.result()

    def _bytes(self) -> int:
        return sum(facts.get("bytes_read", 0) for facts in list(self._facts.values()))

    def _say_progress(self) -> None:
        for name, facts in list(self._facts.items()):
            done, total = facts.get("bytes_read", 0), facts.get("bytes_total", 0)
            if 0 < done < total:
                rate = done / max(time.monotonic() - self._began[name], 1e-3)
                told = {"rate": f"{human_bytes(rate)}/s", "left": human_seconds((total - done) / rate)}
                self._log.say(f"loading {name}", read=f"{human_bytes(done)} of {human_bytes(total)}", **told)

    def _say_quiet(self, name: str, silent_s: float, num_bytes: int) -> None:
        folder = self._folders.get(name, Path())
        self._log.say(
            f"NOTHING MOVES while loading {name}",
            file=folder / str(self._facts.get(name, {}).get("file", "")),
            file_system=file_system_of(folder),
            silent=human_seconds(silent_s),
            bytes_since=human_bytes(num_bytes),
            threads=thread_states(),
            memory=resident_memory(),
        )


def thread_states() -> str:
    """How many of this process's threads are in which state; D waits for a disk."""
    states: Counter[str] = Counter()
    for path in Path("/proc/self/task").glob("*/stat"):
        try:
            states[path.read_text().rpartition(")")[2].split()[0]] += 1
        except OSError:  # that thread has ended
            continue
    return ",".join(f"{count}{state}" for state, count in sorted(states.items()))


def resident_memory() -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return human_bytes(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")))


def file_system_of(path: Path) -> str:
    """Type and source of the mount that a path lies on."""
    here, best = str(path.absolute()), ("", "?", "?")
    for line in Path("/proc/mounts").read_text().splitlines():
        source, mount, kind = line.split()[:3]
        if (here + "/").startswith(mount.rstrip("/") + "/") and len(mount) >= len(best[0]):
            best = (mount, kind, source)
    return f"{best[1]} on {best[0]}"
