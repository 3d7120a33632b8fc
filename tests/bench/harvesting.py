"""What a harvest costs beyond the forwards that it needs, and beside the library's own pipeline.

    python -m tests.bench harvest [--rounds 3] [--records 32]

On the shapes teacher, one thread, in turn, round after round; ratios are of the same round, of wall time and of CPU
time: on a busy machine only the second means something, and it counts the writing that runs beside the forwards.
`run` is everything that `python -m harvest run` does but loading: plan, encoding, walking, checking, packing, writing,
receipts. The bare forwards are those that it needs and nothing else. The pipeline gets the same micro-batch, steps and
prompts.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import load_config
from common.log import Log
from common.schedule import contract_grid, expert_of
from common.stop import StopRequest
from harvest.config import HarvestConfig
from harvest.meaning import make_contract
from harvest.running import loop
from harvest.running.events import HarvestWatch
from harvest.running.loop import ready_teacher
from harvest.running.task import Task, read_task
from harvest.teacher import Teacher

PRESET = Path("configs/harvest/demo.yaml")
SIDES = {64: 128, 256: 256}
"""Image tokens -> pixels."""
GOALS = {64: 1.8, 256: 1.2}


def run(*, rounds: int, records: int, out_dir: Path, sides: dict[int, int] = SIDES) -> list[str]:
    lines = [f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, torch {torch.__version__}, one thread"]
    for tokens, side in sides.items():
        config = load_config(HarvestConfig, PRESET, overrides=[
            f"out={out_dir}/harvest", f"height={side}", f"width={side}", f"prompts.limit={records}",
            "teacher.threads=1", f"records_per_shard={max(1, records // 2)}", "solver=euler",
        ])  # fmt: skip
        task = read_task(config)
        teacher, pipeline = _loaded(task, out_dir), _pipeline(config)
        turns = []
        for number in range(rounds + 1):
            turn = [
                _timed(_run, config, teacher),
                _bare_forwards(task, teacher),
                _timed(_pipe, pipeline, task) * records / config.micro_batch,
            ]
            turns += [np.stack(turn)] if number else []  # the first round warms up
        lines += _told(tokens, np.stack(turns), records)
        shutil.rmtree(out_dir, ignore_errors=True)
    return lines


def _timed(work: Callable[..., None], *arguments: Any) -> np.ndarray:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work(*arguments)
    return np.array([time.perf_counter() - wall, time.process_time() - cpu])


def _told(tokens: int, turns: np.ndarray, records: int) -> list[str]:  # turns [rounds, (run, bare, stock), (wall, CPU)]
    seconds = np.median(turns, axis=0)
    names = zip(("run", "bare forwards", "WanPipeline"), seconds, strict=True)
    spent = ", ".join(f"{name} {wall:.2f} ({cpu:.2f}) s" for name, (wall, cpu) in names)
    return [
        f"{tokens} image tokens, {records} records, wall (CPU): {spent}",
        f"  run / bare forwards {_spread(turns[:, 0] / turns[:, 1])}, goal 1.03",
        f"  WanPipeline / run   {_spread(turns[:, 2] / turns[:, 0])}, goal {GOALS[tokens]}",
    ]


def _spread(ratios: np.ndarray) -> str:  # [rounds, (wall, CPU)]
    return ", CPU ".join(f"{statistics.median(of):.3f} ({min(of):.3f}-{max(of):.3f})" for of in ratios.T)


def _loaded(task: Task, out_dir: Path) -> Teacher:
    log = Log("bench", quiet=True)
    with StopRequest() as stop, HarvestWatch(out_dir / "runs", log, stop, None) as watch:
        return ready_teacher(task, watch, log)


def _run(config: HarvestConfig, teacher: Teacher) -> None:
    """Everything but loading: the teacher is there already."""
    shutil.rmtree(config.out, ignore_errors=True)
    load = loop.load_teacher
    loop.load_teacher = lambda *_: teacher
    try:
        loop.harvest(config)
    finally:
        loop.load_teacher = load


def _bare_forwards(task: Task, teacher: Teacher) -> np.ndarray:
    """As many, as large, at the same noise levels and with the same texts, on one and the same state; each prompt
    through the text encoder once."""
    config = task.config
    contract = make_contract(config, teacher.facts, teacher.fingerprints, teacher.compute_dtype)
    side = contract.latent_stride

    def ask() -> None:
        negative = teacher.encode([contract.negative_prompt])[0]
        for item in task.plan.items:
            texts = {question.prompt: teacher.encode([question.prompt])[0] for question in item.questions}
            grids = [contract_grid(contract, int(question.key, 16)) for question in item.questions]
            which = expert_of(grids[0].timesteps, contract.boundary, train_steps=contract.train_steps)
            for expert in range(contract.num_experts()):
                for start in range(0, len(item.questions), config.micro_batch):
                    group = slice(start, start + config.micro_batch)
                    rows = [texts[question.prompt] for question in item.questions[group]]
                    condition = teacher.condition(rows, negative)
                    state = torch.ones(len(rows), contract.latent_channels, item.height // side, item.width // side)
                    for step in np.flatnonzero(which == expert):
                        levels = np.stack([grid.timesteps[step] for grid in grids[group]])
                        teacher.predict(state, torch.from_numpy(levels), condition)

    return _timed(ask)


def _pipeline(config: HarvestConfig) -> Any:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(config.teacher.folder, variant="fp16", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pipe(pipeline: Any, task: Task) -> None:
    """One micro-batch."""
    config = task.config
    prompts = [question.prompt for item in task.plan.items for question in item.questions][: config.micro_batch]
    pipeline(prompt=prompts, height=config.height, width=config.width, num_frames=1, output_type="latent",
             num_inference_steps=config.steps, guidance_scale=config.guidance[0],
             guidance_scale_2=config.guidance[-1])  # fmt: skip
