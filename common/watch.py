"""Says what a process is doing, to whoever looks, before and while it does it.

    with Watch(run_dir, log) as watch:                 run_dir/heartbeat.json from here on
        with watch.stage("load", deadline_s=600):      a stage that does not move is named, with every thread's stack
            ...; watch.moved(read="3 of 9 GB")

A daemon thread beats; when a stage has not called `moved` for its deadline the state becomes `stalled(stage)` and
the stacks of all threads go to run_dir/stacks.txt, once per stall.
"""

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.files import replace_quietly
from common.log import Log

HEARTBEAT_NAME = "heartbeat.json"
STACKS_NAME = "stacks.txt"
DEAD_AFTER_S = 60.0


class Watch:
    """The heartbeat of one process."""

    def __init__(self, run_dir: Path, log: Log, *, interval_s: float = 2.0) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir, self._log, self._interval_s = run_dir, log, interval_s
        self._started = time.time()
        self._state, self._stage, self._deadline_s = "starting", "start", float("inf")
        self._moved_at, self._stalled = time.monotonic(), False
        self._facts: dict[str, Any] = {}
        self._closed = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def running(self) -> None:
        """Start-up is over: from here on the state is `running`, not `starting(stage)`."""
        self._state = "running"
        self._beat()

    @contextlib.contextmanager
    def stage(self, name: str, *, deadline_s: float) -> Iterator[None]:
        before = self._stage, self._deadline_s
        self._enter(name, deadline_s)
        try:
            yield
        finally:
            self._enter(*before)

    def moved(self, **facts: Any) -> None:
        """The current stage made progress; `facts` stand in the heartbeat."""
        self._facts |= facts
        self._moved_at, self._stalled = time.monotonic(), False

    def heed(self) -> None:
        """Raises where somebody asked to stop; for whoever waits for what may never move."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        self._state = "done" if error is None else "stopped"
        self._facts |= {} if error is None else {"why": f"{type(error).__name__}: {error}"[:500]}
        self._beat()

    def _enter(self, name: str, deadline_s: float) -> None:
        self._stage, self._deadline_s = name, deadline_s
        self._moved_at, self._stalled = time.monotonic(), False
        self._beat()

    def _run(self) -> None:
        while not self._closed.wait(self._interval_s):
            silent_s = time.monotonic() - self._moved_at
            if silent_s > self._deadline_s and not self._stalled:
                with contextlib.suppress(OSError):  # who cannot tell of a stall lives all the same
                    self._report_stall(silent_s)
            self._beat()

    def _report_stall(self, silent_s: float) -> None:
        self._stalled = True
        with contextlib.suppress(OSError), open(self._run_dir / STACKS_NAME, "a", encoding="utf-8") as stacks:
            stacks.write(f"--- {time.ctime()} stage {self._stage} has not moved for {silent_s:.0f} s\n")
            stacks.flush()
            faulthandler.dump_traceback(stacks, all_threads=True)
        with contextlib.suppress(OSError):
            self._log.say(f"STALLED in '{self._stage}'", silent_s=round(silent_s), stacks=STACKS_NAME, **self._facts)

    def _beat(self) -> None:
        state = f"stalled({self._stage})" if self._stalled else self._state
        state = f"starting({self._stage})" if state == "starting" else state
        beat = {
            "state": state,
            "stage": self._stage,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": round(self._started, 1),
            "time": round(time.time(), 1),
            **self._facts,
        }
        with contextlib.suppress(OSError):  # a full or tired disk must not end the work that it describes
            replace_quietly(self._run_dir / HEARTBEAT_NAME, json.dumps(beat).encode())


def read_heartbeat(run_dir: Path) -> dict[str, Any] | None:
    """The last beat, its state turned to `dead` when the process is gone; None when there is none."""
    try:
        beat: dict[str, Any] = json.loads((run_dir / HEARTBEAT_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    over = beat["state"] in ("done", "stopped")
    here = beat["host"] == socket.gethostname()
    gone = not Path(f"/proc/{beat['pid']}").exists() if here else time.time() - beat["time"] > DEAD_AFTER_S
    if gone and not over:
        beat["state"] = f"dead(in {beat['stage']})"
    return beat
