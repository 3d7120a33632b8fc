"""How good a run's student is, measured against its teacher on records of the set.

    report = evaluate(run_dir, num=256, steps=None, grader=load_grader("tests.shapes.grade:grade"))

    held_out     how far its answers are from the teacher's on prompts never trained on: see train/held_out.py
    psnr         of its pictures against the teacher's own, from the teacher's own noise (peak 255)
    graded       with a grader: the share of pictures it passes, per property, student | teacher | their ratio

A grader is any function (picture [H, W, 3] bytes, prompt) -> a bool, a number, or an object whose public bools and
numbers are each a property.
"""

import importlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import BadUsage
from train.chosen import first_records, held_out_records, num_held_out
from train.dist import HOST
from train.held_out import HeldOut, shown
from train.sample import open_run, pairs
from train.start import first_student
from train.watching import NUM_HELD_OUT

Grader = Callable[[np.ndarray, str], Any]
NUMBERS = (bool, int, float, np.number, np.bool_)


def evaluate(run_dir: Path, *, num: int, steps: int | None, grader: Grader | None,
             device: torch.device = HOST) -> dict[str, Any]:  # fmt: skip
    """At the set's own guidance, whatever the student is told in training."""
    trained = open_run(run_dir, device)
    student = trained.student
    rows = student.config.text_max_length
    records = first_records(trained.shards, num)
    grid = trained.objective.grid(steps)
    report: dict[str, Any] = {
        "step": trained.step,
        "samples_seen": trained.samples_seen,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "objective": trained.config.objective,
        "steps": grid.num_steps,
        "records": len(records),
        "records_held_out": num_held_out(records),
    }
    unseen = held_out_records(trained.shards, NUM_HELD_OUT)
    if unseen:
        held_out = HeldOut(trained.objective, unseen, text_rows=rows, device=device)
        first = first_student(trained.config).to(device).eval()
        report["held_out"] = held_out.gap(student).numbers() | {"untrained": held_out.gap(first).numbers()}
    began = time.monotonic()
    mine, theirs = pairs(trained.shards, trained.answer(None), records, grid, text_rows=rows, device=device)
    report["seconds"] = round(time.monotonic() - began, 2)
    report["psnr"] = float(np.mean([psnr(a, b) for a, b in zip(mine, theirs, strict=True)]))
    if grader is not None:
        prompts = [record.prompt for record in records]
        report["graded"] = compared(graded(grader, mine, prompts), graded(grader, theirs, prompts))
    return report


def psnr(mine: np.ndarray, theirs: np.ndarray) -> float:
    """In decibels; equal pictures count as one step of one byte in all."""
    error = np.square(mine.astype(np.float64) - theirs.astype(np.float64)).mean()
    return 10 * math.log10(255**2 / max(error, 1 / mine.size))


def graded(grader: Grader, pictures: np.ndarray, prompts: list[str]) -> dict[str, float]:
    """Property -> mean over the pictures; what a grader does not say of a picture has not been passed."""
    grades = [properties(grader(picture, prompt)) for picture, prompt in zip(pictures, prompts, strict=True)]
    names = sorted({name for grade in grades for name in grade})
    return {name: float(np.mean([grade.get(name, 0.0) for grade in grades])) for name in names}


def properties(grade: Any) -> dict[str, float]:
    if isinstance(grade, NUMBERS):
        return {"score": float(grade)}
    named = grade if isinstance(grade, Mapping) else {
        name: getattr(grade, name) for name in dir(grade) if not name.startswith("_")
    }  # fmt: skip
    return {name: float(value) for name, value in named.items() if isinstance(value, NUMBERS)}


def compared(mine: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    return {
        name: {"student": mine[name], "teacher": theirs[name],
               "ratio": mine[name] / theirs[name] if theirs[name] else None}
        for name in mine
    }  # fmt: skip


def load_grader(name: str) -> Grader:
    """`package.module:function`, found from the working folder."""
    module, _, function = name.partition(":")
    try:
        sys.path.insert(0, "")
        grader: Grader = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadUsage(wrong=f"--grader {name}", found=str(error), mend="give module:function") from None
    finally:
        sys.path.remove("")
    return grader


def report_lines(report: Mapping[str, Any]) -> list[str]:
    seen = f"{report['records']} pictures, {report['records_held_out']} of prompts never trained on"
    lines = [f"step {report['step']}, {report['samples_seen']} samples; {report['steps']} steps a picture, {seen}",
             f"PSNR against the teacher's own pictures from its own noise: {report['psnr']:.2f} dB"]  # fmt: skip
    if "held_out" in report:
        gap, untrained = report["held_out"], report["held_out"]["untrained"]
        lines.append("held-out gap to the teacher (0: equal, 1: no better than the mean): "
                     f"{shown(gap['gap'])}, untrained {shown(untrained['gap'])}")  # fmt: skip
        lines += [f"  {name}: {', '.join(_short(share) for share in gap[key])}"
                  for name, key in (("quarters of sigma from low to high", "gap_by_level"),
                                    ("experts, high noise first", "gap_by_expert"))]  # fmt: skip
    for name, scores in report.get("graded", {}).items():
        lines.append(f"{name}: student {scores['student']:.3f}, teacher {scores['teacher']:.3f}, "
                     f"ratio {_short(scores['ratio'])}")  # fmt: skip
    return lines


def _short(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"
