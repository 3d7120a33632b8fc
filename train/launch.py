"""One command, all GPUs: who starts the other processes.

    adopt_srun(os.environ)                           torchrun and accelerate launch speak torch's words already
    num = processes_to_start(config, os.environ)     0, 1: this process does its work itself
    code = start_processes(num, sys.argv[1:])        the same command once per GPU; the first fault's exit code

Several nodes: torchrun's own rendezvous, on each node, and we start nothing.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence
from types import FrameType

from common.errors import BadUsage, Stopped
from train.config import TrainConfig

GRACE_S = 60.0
"""For the others, when one has ended with a fault."""
WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def adopt_srun(environment: MutableMapping[str, str]) -> None:
    """srun says who we are in words of its own; torch wants torchrun's."""
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    if int(environment.get("SLURM_STEP_NUM_NODES", "1")) > 1 and "MASTER_ADDR" not in environment:
        raise BadUsage(
            wrong="srun over several nodes without a meeting point",
            found="no MASTER_ADDR",
            mend='export MASTER_ADDR=$(scontrol show hostnames "$SLURM_NODELIST" | head -n1) MASTER_PORT=29500 first',
        )
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000))


def processes_to_start(config: TrainConfig, environment: Mapping[str, str]) -> int:
    """0 or 1: nobody else is started, because somebody did so or there is one device."""
    started = int(environment.get("WORLD_SIZE", "1"))
    if "RANK" in environment:
        missing = [name for name in WORLD if name not in environment]
        if started > 1 and missing:
            raise BadUsage(
                wrong="RANK is set, and what belongs to it is not",
                found=f"no {', '.join(missing)}",
                mend="start with torchrun, accelerate launch or srun, or unset RANK",
            )
        if config.processes not in (None, started):
            raise BadUsage(
                wrong=f"two launchers: processes: {config.processes} and torchrun (or srun, accelerate) at once",
                found=f"{started} processes were started already",
                mend="leave torchrun away: `python -m train run CONFIG` starts them itself; or set processes: null",
            )
        return 0
    if config.device == "cpu":
        return config.processes or 1
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.processes and num_gpus and config.processes > num_gpus:
        raise BadUsage(
            wrong=f"processes: {config.processes}, one per GPU",
            found=f"{num_gpus} GPUs; CUDA_VISIBLE_DEVICES {environment.get('CUDA_VISIBLE_DEVICES', 'is not set')}",
            mend=f"set processes to {num_gpus} or less, or null for all",
        )
    if config.device.startswith("cuda:"):  # one was named
        return 1
    return config.processes or max(1, num_gpus)


def start_processes(num: int, words: Sequence[str]) -> int:
    """`python -m train WORDS`, `num` times on this node; the exit code of the first that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num)))
    children = [
        subprocess.Popen([sys.executable, "-m", "train", *words],
                         env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num)
    ]  # fmt: skip

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all of them; twice would mean: at once
    return _wait(children)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    failed: int | None = None
    give_up = float("inf")
    while [child for child in children if child.poll() is None]:  # each is asked: `any` would stop at the first alive
        if failed is None:
            faults = (child.returncode for child in children if child.returncode not in (None, 0, Stopped.exit_code))
            failed = next(faults, None)
            give_up = time.monotonic() + GRACE_S if failed is not None else give_up
        if time.monotonic() > give_up:
            for child in children:
                child.kill()
        time.sleep(0.05)
    codes = [child.returncode for child in children if child.returncode]
    code = failed if failed is not None else next(iter(codes), 0)
    return code if code >= 0 else 128 - code
