"""`harvest run --student JSON`: a student's first weights, left in the set beside what it will learn from.

    leave_student(config, Path("configs/students/hidden256.json"))        assets/init/hidden256/

Training's own command does it, as a process: harvest and train know nothing of each other. It comes last, because the
student is cut by what was heard while the teacher answered. A folder with weights is whole, and is left as it is.
"""

import subprocess
import sys
from pathlib import Path

from common.log import Log
from common.shards import ASSETS
from harvest.config import HarvestConfig
from harvest.running.workers import fault_of

INIT, WEIGHTS_NAME = "init", "model.safetensors"


def leave_student(config: HarvestConfig, student_path: Path) -> Path:
    out = config.out / ASSETS / INIT / student_path.stem
    if (out / WEIGHTS_NAME).exists():
        Log("harvest").say(f"student {out} is there")
        return out
    words = ["-m", "train", "init", "--teacher", config.teacher.folder, "--student", student_path, "--set", config.out]
    command = [sys.executable, *map(str, words), "--out", str(out)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise fault_of([done.returncode])(
            wrong="--student: no first weights were made; the records are whole",
            found=f"`python -m train init` ended with {done.returncode}, and said why above",
            mend=f"mend what it says, or {student_path}, then run the same command again",
        )
    return out
