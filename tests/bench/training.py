"""What a training step costs beside its arithmetic: the wait for data, a second process, memory, checkpointing.

    python -m tests.bench training [--steps 300] [--rounds 5] [--set out/demo/set --init out/demo/init]

    fed from the set | fed from memory      the same run of `train.loop`, in turn, round after round: share of the step
                                            time that data is waited for, ratio of steps/s, resident bytes as it goes
    one process | two                       `python -m train run`, one thread each: ratio of samples/s
    checkpointing off | on                  one student's steps at two picture sizes, each in a process of its own

All rates are of the second half of a run: what is measured is the steady state. Ratios are of neighbours in time.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from common.config import load_config
from common.log import human_bytes
from common.shards import ShardSet
from tests.bench.students import called
from tests.made import ROOT
from train import loop
from train.config import TrainConfig
from train.dist import World
from train.feed.data import Feed, Micro, Step
from train.objective import objective_of
from train.out_of_memory import probe
from train.plan import activation_bytes
from train.run_folder import read_metrics
from train.student.network import load_student

HARVEST, TRAIN, STUDENT = "configs/harvest/demo.yaml", "configs/train/demo.yaml", "configs/students/demo.json"
TEACHER = "configs/teachers/shapes"
REMEMBERED = 16
"""Steps that the loop is fed again and again from memory."""
LINES = 20
"""Of the log, of one run."""
WARM = 100
"""Steps, after which memory should not grow."""
SIDES, BATCH = (256, 512), 4
GOALS = {"wait": 0.01, "memory": 0.98, "processes": 1.7}


def run(folder: Path, *, steps: int, rounds: int, set_path: Path | None, init: Path | None,
        prompts: int = 64) -> Iterator[str]:  # fmt: skip
    yield f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, torch {torch.__version__}"
    set_path, init = made(folder, prompts) if set_path is None or init is None else (set_path, init)
    yield from beside_memory(folder / "run", set_path, init, steps=steps, rounds=rounds)
    yield from beside_two(folder / "run", set_path, init, steps=steps, rounds=rounds)
    yield from checkpointing(init, set_path, SIDES)


def made(folder: Path, prompts: int) -> tuple[Path, Path]:
    """A small harvest of the demo's, and the demo's student."""
    set_path, init = folder / "set", folder / "init"
    called("harvest", "run", HARVEST, "--set", f"out={set_path}", "--set", f"prompts.limit={prompts}")
    called("train", "init", "--teacher", TEACHER, "--student", STUDENT, "--out", str(init))
    return set_path, init


def beside_memory(out: Path, set_path: Path, init: Path, *, steps: int, rounds: int) -> Iterator[str]:
    config = configured(out, set_path, init, steps, ["threads=1"])
    waits, ratios, rates, grown = [], [], [], []
    trained(config, from_memory=True)  # the first of all is slower: libraries, the page cache
    for _ in range(rounds):
        fed, resident = trained(config, from_memory=False)
        remembered, _ = trained(config, from_memory=True)
        waits.append(statistics.mean(line["data_wait"] for line in fed))
        rates.append(rate(fed, "steps_per_s"))
        ratios.append(rates[-1] / rate(remembered, "steps_per_s"))
        grown.append(resident[max(resident)] - resident[min(resident, key=lambda step: abs(step - WARM))])
    yield f"{steps} steps of {config.batch_size}, {statistics.median(rates):.1f} steps/s on one thread"
    yield told("waiting for data, share of the step", waits, GOALS["wait"], more=False)
    yield told("steps/s, of those of the loop fed from memory", ratios, GOALS["memory"], more=True)
    yield (f"resident bytes from step {min(WARM, steps)} to the end: "
           f"{', '.join(f'{size / 1e6:+.1f} MB' for size in grown)}")  # fmt: skip


def beside_two(out: Path, set_path: Path, init: Path, *, steps: int, rounds: int) -> Iterator[str]:
    ratios, alone = [], []
    for _ in range(rounds):
        rates = []
        for num in (1, 2):
            shutil.rmtree(out, ignore_errors=True)
            config = configured(out, set_path, init, steps, ["threads=1"])
            asked = {"out": out, "set": set_path, "init": init, "threads": 1, "processes": num, "log_every":
                     config.log_every, "checkpoint_every": 10**9, "num_epochs": config.num_epochs * num}  # fmt: skip
            sets = [word for name, value in asked.items() for word in ("--set", f"{name}={value}")]
            called("train", "run", TRAIN, *sets)
            rates.append(rate(steady(read_metrics(out)), "samples_per_s"))
        alone.append(rates[0])
        ratios.append(rates[1] / rates[0])
    yield f"one process of one thread: {statistics.median(alone):.0f} samples/s"
    yield told("samples/s of two processes, of one's", ratios, GOALS["processes"], more=True)


def checkpointing(init: Path, set_path: Path, sides: Sequence[int]) -> Iterator[str]:
    yield "| picture | checkpointing | seconds a step | peak beyond weights and gradients | planned activations |"
    yield "|---|---|---|---|---|"
    for side in sides:
        for switch in (False, True):
            words = [
                sys.executable,
                "-m",
                "tests.bench.training",
                str(init),
                str(set_path),
                str(side),
                str(int(switch)),
            ]
            done = subprocess.run(
                words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            cost = json.loads(done.stdout)
            yield (f"| {side}x{side} | {'on' if switch else 'off'} | {cost['seconds']:.2f} "
                   f"| {human_bytes(cost['peak'])} | {human_bytes(cost['planned'])} |")  # fmt: skip


def configured(out: Path, set_path: Path, init: Path, steps: int, more: Sequence[str] = ()) -> TrainConfig:
    """The demo's own training, as long as it is asked to be."""
    places = [f"out={out}", f"set={set_path}", f"init={init}", f"log_every={max(1, steps // LINES)}"]
    config = load_config(TrainConfig, ROOT / TRAIN, overrides=[*places, "checkpoint_every=1000000000", *more])
    receipts = ShardSet.open(set_path).manifest().receipts
    points = sum(int((~receipt.held_out_records()).sum()) * receipt.num_points for receipt in receipts)
    return config.model_copy(update={"num_epochs": steps * config.batch_size / points})


def trained(config: TrainConfig, *, from_memory: bool) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """The lines of a run's steady state, and the process's resident bytes at each of its lines."""
    shutil.rmtree(config.out, ignore_errors=True)
    real_feed, real_take, resident = loop.Run.feed, loop.Tally.take, {}

    def take(tally: Any) -> dict[str, Any]:
        resident[tally._state.step] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return real_take(tally)

    def feed(self: Any, log: Any, batch_size: int) -> Any:
        return Remembered(real_feed(self, log, batch_size))

    loop.Tally.take = take  # type: ignore[method-assign]
    loop.Run.feed = feed if from_memory else real_feed  # type: ignore[method-assign]
    try:
        loop.train(config, World(rank=0, size=1, device=torch.device("cpu")))
    finally:
        loop.Run.feed, loop.Tally.take = real_feed, real_take  # type: ignore[method-assign]
    return steady(read_metrics(config.out)), resident


class Remembered:
    """A feed that costs nothing: some steps of a real one, kept and given again."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def __iter__(self) -> Iterator[Step]:
        source = iter(self._feed)
        kept = []
        for _ in range(REMEMBERED):
            step = next(source)
            micros = tuple(Micro(**{name: tensor.clone() for name, tensor in micro.tensors().items()})
                           for micro in step.micros)  # fmt: skip
            kept.append(Step(micros=micros, samples=step.samples, epoch=step.epoch, cursor=step.cursor))
        while True:
            yield from kept

    def close(self) -> None:
        self._feed.close()


def steady(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    steps = [line for line in lines if "loss" in line]
    return steps[len(steps) // 2 :]


def rate(lines: list[dict[str, Any]], name: str) -> float:
    """Over lines of equally many steps: the harmonic mean."""
    return statistics.harmonic_mean([line[name] for line in lines])


def told(what: str, figures: list[float], goal: float, *, more: bool) -> str:
    middle = statistics.median(figures)
    holds = middle >= goal if more else middle <= goal
    return (f"{'holds ' if holds else 'MISSES'} {what}: {middle:.4f} ({min(figures):.4f}-{max(figures):.4f} of "
            f"{len(figures)} rounds), goal {'at least' if more else 'at most'} {goal}")  # fmt: skip


def step_cost(init: Path, set_path: Path, side: int, checkpoint: bool) -> dict[str, float]:
    """Of forward and backward at BATCH pictures of zeros, by this process alone."""
    torch.set_num_threads(1)
    contract = ShardSet.open(set_path).contract
    asked = ["batch_size=4", f"gradient_checkpointing={checkpoint}".lower()]
    config = load_config(TrainConfig, ROOT / TRAIN, overrides=asked)
    student = load_student(init, gradient_checkpointing=checkpoint).train()
    objective = objective_of(config, contract)
    rows = min(student.config.text_max_length, 32)
    text, lengths = torch.zeros(BATCH, rows, contract.text_dim), torch.full((BATCH,), rows)

    def step(side: int) -> float:
        question = objective.ask(probe(objective, contract, (side, side), BATCH, rows))
        began = time.perf_counter()
        answer = student(question.latents, question.timesteps, text, lengths)
        (answer - question.target).square().mean().backward()
        return time.perf_counter() - began

    step(side // 4)  # code, gradients and the first step's tables are no activations
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    before = resident_bytes("VmRSS")
    seconds = [step(side) for _ in range(4)]
    planned = activation_bytes(config, student.config, (side, side))
    return {"seconds": statistics.median(seconds[1:]), "peak": resident_bytes("VmHWM") - before, "planned": planned}


def resident_bytes(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


if __name__ == "__main__":
    init_dir, set_dir, side_of, switched = sys.argv[1:]
    print(json.dumps(step_cost(Path(init_dir), Path(set_dir), int(side_of), switched == "1")))
