"""What a person or a scheduler wants to be told of: `on_event: CMD` in the configuration.

    tell(config.on_event, "stall", {"stage": "denoise"}, log)

The shell gets HARVEST_EVENT (stall | quarantine | retired | done) and, in HARVEST_FACTS, one JSON object. A command
that fails or takes longer than its time is said, and harms nothing.
"""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.log import Log
from common.stop import StopRequest
from common.watch import Watch

MAX_SECONDS = 60.0


def tell(command: str | None, event: str, facts: Mapping[str, Any], log: Log) -> None:
    if command is None:
        return
    environment = os.environ | {"HARVEST_EVENT": event, "HARVEST_FACTS": json.dumps(facts)}
    try:
        process = subprocess.Popen(command, shell=True, env=environment, stdin=subprocess.DEVNULL,
                                   start_new_session=True)  # fmt: skip
    except OSError as error:
        log.say(f"on_event {event}: {error}")
        return
    try:
        code = process.wait(MAX_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        code = -signal.SIGKILL
    if code:
        log.say(f"on_event {event}: the command ended with {code}")


class HarvestWatch(Watch):
    """A watch that tells of a stall, and that obeys a wish to stop wherever something moves, loading included."""

    def __init__(self, run_dir: Path, log: Log, stop: StopRequest, command: str | None) -> None:
        self._stop, self._command = stop, command
        super().__init__(run_dir, log)

    def moved(self, **facts: Any) -> None:
        super().moved(**facts)
        self.heed()

    def heed(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._stop.check()

    def _report_stall(self, silent_s: float) -> None:
        super()._report_stall(silent_s)
        tell(self._command, "stall", {"stage": self._stage, "silent_s": round(silent_s)}, self._log)
