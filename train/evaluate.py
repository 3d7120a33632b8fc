"""How good a run's student is, measured against its teacher on records of the set.

    report = evaluate(run_dir, num=256, steps=None, grader=load_grader("tests.shapes.grade:grade"))

    held_out     how far its answers are from the teacher's on prompts never trained on: see train/held_out.py
    psnr         of its pictures against the teacher's own, from the teacher's own noise (peak 255); else no_psnr: why
    graded       with a grader: the share of pictures it passes, per property, student | teacher | their ratio
                 (student | set | ratio, where a set's pictures are not its teacher's)

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

from common.errors import BadUsage, Fault
from common.log import Log
from train.chosen import first_records, found_again, held_out_records, num_held_out, skipping, strict
from train.config import TrainConfig
from train.dist import HOST
from train.held_out import HeldOut, shown
from train.run_folder import newest_or_given
from train.sample import Trained, open_run, pairs
from train.start import first_student
from train.watched import Watched
from train.watching import NUM_HELD_OUT, why_undrawable

Grader = Callable[[np.ndarray, str], Any]
NOT_DRAWN = "the set's pictures are its own (source: images), which nobody drew from a record's noise"
NUMBERS = (bool, int, float, np.number, np.bool_)


def evaluate(run_dir: Path, *, num: int, steps: int | None, grader: Grader | None,
             device: torch.device = HOST) -> dict[str, Any]:  # fmt: skip
    """A student that is told the guidance is told the set's own. What cannot be had is left out, and said."""
    trained = open_run(run_dir, device)
    log = Log("eval")
    pardon = skipping(log.say) if trained.config.on_corrupt == "skip" else strict
    student, shards = trained.student, trained.shards
    rows = student.config.text_max_length
    records = first_records(shards, num, pardon)
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
    if guidance := _other_guidance(trained):
        report["guidance"] = guidance
    watched = Watched.read(newest_or_given(run_dir)[0])
    again = [record for _, record in found_again(shards, watched.held_out, pardon, log.say)]
    if unseen := again or held_out_records(shards, NUM_HELD_OUT, pardon):
        held_out = HeldOut(trained.objective, unseen, text_rows=rows, device=device)
        report["held_out"] = held_out.gap(student).numbers() | _untrained(held_out, trained.config, device)
    why = why_undrawable(shards)
    if no_psnr := why or (NOT_DRAWN if shards.contract.source == "images" else None):
        report["no_psnr"] = no_psnr
    if why or (no_psnr and grader is None):
        return report
    began = time.monotonic()
    mine, theirs = pairs(shards, trained.answer(None), records, grid, text_rows=rows, device=device)
    report["seconds"] = round(time.monotonic() - began, 2)
    if no_psnr is None:
        report["psnr"] = float(np.mean([psnr(a, b) for a, b in zip(mine, theirs, strict=True)]))
    if grader is not None:
        prompts = [record.prompt for record in records]
        report["graded"] = compared(graded(grader, mine, prompts), graded(grader, theirs, prompts),
                                    other="set" if no_psnr else "teacher")  # fmt: skip
    return report


def _other_guidance(trained: Trained) -> dict[str, list[float]] | None:
    """The student's one w and the set's, where they are two."""
    mine, own = trained.config.guidance, trained.shards.contract.guidance
    return {"student": list(mine), "set": list(own)} if isinstance(mine, tuple) and mine != own else None


def _untrained(held_out: HeldOut, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    try:
        first = first_student(config).to(device).eval()
    except (Fault, OSError) as error:
        return {"untrained": None, "no_untrained": str(error)}
    return {"untrained": held_out.gap(first).numbers()}


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


def compared(mine: Mapping[str, float], theirs: Mapping[str, float], *,
             other: str = "teacher") -> dict[str, dict[str, float | None]]:  # fmt: skip
    return {
        name: {"student": mine[name], other: theirs[name],
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
    lines = [f"step {report['step']}, {report['samples_seen']} samples; {report['steps']} steps a picture, {seen}"]
    if "guidance" in report:
        taught, own = (", ".join(f"{w:g}" for w in report["guidance"][who]) for who in ("student", "set"))
        lines.append(f"guidance: the student was taught {taught}, to which its gap is; the set's pictures have {own}")
    if "psnr" in report:
        lines.append(f"PSNR against the teacher's own pictures from its own noise: {report['psnr']:.2f} dB")
    else:
        lines.append(f"no PSNR: {report['no_psnr']}")
    lines += _gap_lines(report["held_out"]) if "held_out" in report else []
    for name, scores in report.get("graded", {}).items():
        lines.append(f"{name}: " + ", ".join(f"{who} {_short(score)}" for who, score in scores.items()))
    return lines


def _gap_lines(gap: Mapping[str, Any]) -> list[str]:
    untrained = gap["untrained"]["gap"] if gap["untrained"] else None
    lines = ["held-out gap to the teacher (0: equal, 1: no better than the mean): "
             f"{shown(gap['gap'])}, untrained {shown(untrained)}"]  # fmt: skip
    if "no_untrained" in gap:
        lines.append(f"  the untrained student cannot be opened: {gap['no_untrained']}")
    lines += [f"  {name}: {', '.join(_short(share) for share in gap[key])}"
              for name, key in (("quarters of sigma from low to high", "gap_by_level"),
                                ("experts, high noise first", "gap_by_expert"))]  # fmt: skip
    return lines


def _short(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"
