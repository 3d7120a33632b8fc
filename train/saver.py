"""Checkpoints off the step's path: copied in the step's own thread, written in another.

saver = Saver(run_dir, Keep(newest=2), log)
saver.save(state, facts); saver.require_sound(); saver.finish()
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import Partial
from common.files import FULL
from common.log import Log
from train.state import Keep, Snapshot, TrainState, snapshot_of, write_checkpoint


class Saver:
    """Writes in a thread what was copied in the step's own: one save at a time, each waited for before the next."""

    def __init__(self, run_dir: Path, keep: Keep, log: Log) -> None:
        self._run_dir, self._keep, self._log = run_dir, keep, log
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: TrainState, facts: Mapping[str, Any]) -> None:
        self.finish()
        began = time.monotonic()
        snapshot = snapshot_of(state, facts)
        copied_s = time.monotonic() - began
        self._thread = threading.Thread(target=self._write, args=(snapshot, copied_s), name="save")
        self._thread.start()

    def require_sound(self) -> None:
        """A save that failed is not found out at the next one, a night later."""
        if self._error is not None:
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written; what went wrong is raised here."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, snapshot: Snapshot, copied_s: float) -> None:
        began = time.monotonic()
        try:
            folder = write_checkpoint(self._run_dir, snapshot, self._keep)
        except OSError as error:
            self._error = _told(error, self._run_dir) if error.errno in FULL else error
            return
        except BaseException as error:  # raised in the loop's thread
            self._error = error
            return
        spent = f"{time.monotonic() - began:.2f}"
        self._log.say(f"checkpoint {folder.name}", held_up=f"{copied_s:.2f}s", written_in=f"{spent}s")


def _told(error: OSError, run_dir: Path) -> Partial:
    return Partial(
        wrong="there is no space left for a checkpoint",
        found=f"{error.strerror} in {run_dir}; the checkpoints before it are whole",
        mend="make room and run the same command again, or keep fewer (keep_checkpoints)",
    )
