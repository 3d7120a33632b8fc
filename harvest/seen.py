"""What was found in files that look as they did: read once, not by every worker at every start.

    seen = Seen("pictures", {"path": ..., "frame": None})
    told = seen.of("a.jpg", [Path("a.jpg"), Path("a.txt")], lambda: [...])      JSON values
    seen.keep()                          only what was asked for this time
    seen.keep_so_far()                   when the end was not reached: what was known before, too

What is read is kept every minute: who is stopped while he reads a million pictures goes on from there. A cache in the
user's own: a file counts as seen while size, time and inode are what they were. One that cannot be written, or was
torn, costs only time.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import write_atomic

KEPT_EVERY_S = 60.0


class Seen:
    def __init__(self, kind: str, of: Mapping[str, Any]) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:32]
        self._path = home / "wan-lite" / kind / f"{name}.json"
        self._before: dict[str, Any] = self._read()
        self._now: dict[str, Any] = {}
        self._kept_at = time.monotonic()

    def of(self, name: str, files: Sequence[Path], read: Callable[[], Any]) -> Any:
        look = [[stat.st_size, stat.st_mtime_ns, stat.st_ino] for stat in (file.stat() for file in files)]
        before = self._before.get(name)
        told = before["told"] if before is not None and before["look"] == look else read()
        self._now[name] = {"look": look, "told": told}
        if time.monotonic() - self._kept_at > KEPT_EVERY_S:
            self.keep_so_far()
            self._kept_at = time.monotonic()
        return told

    def keep(self) -> None:
        self._write(self._now)

    def keep_so_far(self) -> None:
        self._write(self._before | self._now)

    def _write(self, told: dict[str, Any]) -> None:
        if told == self._before:
            return
        with contextlib.suppress(OSError):
            write_atomic(self._path, json.dumps(told).encode())

    def _read(self) -> dict[str, Any]:
        try:
            told = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        whole = isinstance(told, dict) and all(isinstance(each, dict) and {"look", "told"} <= each.keys()
                                               for each in told.values())  # fmt: skip
        return told if whole else {}
