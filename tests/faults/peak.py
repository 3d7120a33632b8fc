"""How much memory a harvest takes at most, by the number of its prompts.

    python -m tests.faults.peak CONFIG 4 40        prints one JSON object: prompts -> peak bytes above the start

Each in a child of its own, forked after the imports: what was there before counts for none of them.
"""

import json
import os
import sys
from pathlib import Path

from common.config import load_config
from harvest.config import HarvestConfig
from harvest.running.loop import harvest
from tests.bench.rounds import _memory, _reset_peak
from tests.faults.harvests import import_all


def peak_of(config: HarvestConfig) -> int:
    """Bytes, measured in a child that harvests `config`."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        code = 1
        try:
            before = _reset_peak()
            harvest(config)
            os.write(writing, str(_memory("VmHWM") - before).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as answer:
        told = answer.read()
    os.wait()
    return int(told)


if __name__ == "__main__":
    import_all()
    config = load_config(HarvestConfig, Path(sys.argv[1]))
    peaks = {}
    for limit in map(int, sys.argv[2:]):
        prompts = config.prompts.model_copy(update={"limit": limit})
        out = config.out.with_name(f"set-of-{limit}")
        peaks[limit] = peak_of(config.model_copy(update={"prompts": prompts, "out": out}))
    sys.stdout.write(json.dumps(peaks) + "\n")
