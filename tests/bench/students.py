"""Students of the shapes teacher, from one harvest: what they keep of their teacher's score, by size and by samples.

    lines = run(teacher_dir, folder, only=["1/4", "1/4 in 4 steps"])

harvest (every step of 8 kept) -> for each student: train init -> train run -> train eval --grader, all through the
command lines, one after the other, as much training as two cores do in about eight minutes. The grader's scores are
of the set's records, held-out captions first; the teacher's own pictures of the same noise are graded beside, and at
the end those that it draws of them in twenty steps. What a student scored stays in its folder: the same command goes on
with the next one (and with what the folder holds: after a change of this file give another --out; the minutes of a run
that was stopped are those of its last piece).
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from common.shards import ASSETS, ShardSet
from tests.bench.curves import write_curves
from tests.shapes.draw import shuffled, training_scenes
from train.chosen import first_records
from train.evaluate import graded, load_grader
from train.run_folder import checkpoints
from train.sample import pictures
from train.vae.network import load_vae

NUM_PROMPTS, SEEDS, STEPS = 2394, 2, 8
NUM_GRADED, MORE_STEPS = 256, 20
CURVE_POINTS = 4
CURVES_NAME, SCORE_NAME = "students.json", "score.json"
GRADER = "tests.shapes.grade:grade"


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    shape: dict[str, int]
    samples: int
    """About eight minutes of them."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the training configuration."""
    fresh: bool = False
    """Without the teacher's weights."""
    after: str | None = None
    """Begins with the weights of this one, trained."""


HALF = {"hidden_size": 144, "num_heads": 3, "depth": 6, "ffn_dim": 408}
QUARTER = {"hidden_size": 120, "num_heads": 3, "depth": 5, "ffn_dim": 176}
EIGHTH = {"hidden_size": 80, "num_heads": 2, "depth": 6, "ffn_dim": 88}
STUDENTS = {
    "1/2": Student(shape=HALF, samples=110_000),
    "1/4": Student(shape=QUARTER, samples=160_000),
    "1/8": Student(shape=EIGHTH, samples=180_000),
    "1/4, random start": Student(shape=QUARTER, samples=160_000, fresh=True),
    "1/4 in 4 steps": Student(
        shape=QUARTER, samples=160_000, after="1/4", changes={"objective": "segment", "segments": 4}
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """A student when it was trained."""

    name: str
    parameters: int
    minutes: float
    forwards: int
    """For a picture."""
    teacher: float
    """The score of its teacher's own pictures."""
    curve: list[tuple[int, float]]
    """Samples seen, score: at each checkpoint."""

    def __str__(self) -> str:
        samples, score = self.curve[-1]
        return (f"| {self.name} | {self.parameters / 1e6:.2f} M | {samples} | {self.minutes:.1f} | {self.forwards} "
                f"| {score:.3f} | {score / self.teacher:.3f} |")  # fmt: skip


def run(teacher_dir: Path, folder: Path, *, only: Sequence[str]) -> Iterator[str]:
    began = time.monotonic()
    config = harvest_config(teacher_dir, folder)
    called("harvest", "run", str(config))
    yield f"harvest: {NUM_PROMPTS * SEEDS * STEPS} points in {(time.monotonic() - began) / 60:.1f} min"
    yield "| student | parameters | samples | minutes | forwards | score | of its teacher's |\n" + "|---" * 7 + "|"
    students = []
    for name in only or STUDENTS:
        score_path = folder_of(folder, name) / SCORE_NAME
        if not score_path.exists():
            score_path.write_text(json.dumps(asdict(one(name, STUDENTS[name], teacher_dir, folder))))
        students.append(Graded(**json.loads(score_path.read_text())))
        yield str(students[-1])
    score = in_more_steps(teacher_dir, folder)
    yield f"the teacher in {MORE_STEPS} steps of two forwards: {score:.3f}; of that: " + ", ".join(
        f"{student.name} {student.curve[-1][1] / score:.3f}" for student in students)  # fmt: skip
    (folder / CURVES_NAME).write_text(json.dumps([asdict(student) for student in students], indent=1))
    write_curves(students, folder / "students.svg")
    yield f"the curves: {folder / 'students.svg'}"


def folder_of(folder: Path, name: str) -> Path:
    return folder / name.replace("/", "-").replace(" ", "_").replace(",", "")


def one(name: str, student: Student, teacher_dir: Path, folder: Path) -> Graded:
    place = folder_of(folder, name)
    place.mkdir(parents=True, exist_ok=True)
    student_path = place / "student.json"
    demo = {"num_channels": 16, "image_size": 128, "patch_size": 16, "text_encoder_output_dim": 96}
    student_path.write_text(json.dumps(student.shape | demo))
    if not (place / "init" / "model.safetensors").exists():
        called("train", *first_weights(student, student_path, teacher_dir, folder), "--out", str(place / "init"))
    path = place / "train.yaml"
    path.write_text(yaml.safe_dump(train_config(place, folder, student)))
    began = time.monotonic()
    called("train", "run", str(path))
    return graded_run(name, place, (time.monotonic() - began) / 60)


def first_weights(student: Student, student_path: Path, teacher_dir: Path, folder: Path) -> list[str]:
    """The words that make them."""
    if student.after:
        return ["export", str(folder_of(folder, student.after) / "run"), "--format", "wanlite"]
    start = ["--fresh"] if student.fresh else ["--teacher", str(teacher_dir)]
    return ["init", *start, "--student", str(student_path), "--set", str(folder / "set")]


def train_config(place: Path, folder: Path, student: Student) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(Path("configs/train/demo.yaml").read_text(encoding="utf-8"))
    config |= {"processes": 2, "threads": 1, "precision": "bfloat16", "muon": {"lr": 8e-3}, **student.changes}
    num_points = student.changes.get("segments", STEPS) * NUM_PROMPTS * SEEDS * 0.98
    steps = student.samples // (config["batch_size"] * config["processes"])
    config |= {"set": str(folder / "set"), "init": str(place / "init"), "out": str(place / "run"), "ema_decay": 0.998}
    config |= {"num_epochs": student.samples / num_points, "log_every": 100}
    return config | {"checkpoint_every": steps // CURVE_POINTS, "keep_checkpoints": 2 * CURVE_POINTS}


def graded_run(name: str, place: Path, minutes: float) -> Graded:
    """Every checkpoint of a run, by its pictures of the same noise as its teacher's."""
    curve = []
    for checkpoint in checkpoints(place / "run"):
        report = json.loads(
            called("train", "eval", str(checkpoint), "--num", str(NUM_GRADED), "--grader", GRADER, "--json")
        )
        curve.append((report["samples_seen"], report["graded"]["all"]["student"]))
    return Graded(name=name, parameters=report["parameters"], minutes=minutes, forwards=report["steps"],
                  teacher=report["graded"]["all"]["teacher"], curve=curve)  # fmt: skip


def in_more_steps(teacher_dir: Path, folder: Path) -> float:
    """The teacher's score of the records that its students are graded by, from the same noise."""
    records = first_records(ShardSet.open(folder / "set"), NUM_GRADED)
    wishes = folder / "graded.jsonl"
    wishes.write_text("".join(f"{json.dumps({'prompt': each.prompt, 'seed': each.seed})}\n" for each in records))
    config = yaml.safe_load(harvest_config(teacher_dir, folder).read_text())
    config |= {"out": str(folder / "set_in_more_steps"), "steps": MORE_STEPS, "keep": 2}
    config["prompts"] |= {"file": str(wishes), "seeds_per_prompt": 1}
    path = folder / "harvest_in_more_steps.yaml"
    path.write_text(yaml.safe_dump(config))
    called("harvest", "run", str(path))
    shards = ShardSet.open(folder / "set_in_more_steps")
    drawn = first_records(shards, NUM_GRADED)
    assert {record.key for record in drawn} == {record.key for record in records}
    finals = torch.from_numpy(np.stack([record.final for record in drawn]).astype(np.float32))
    with torch.inference_mode():
        found = pictures(load_vae(shards.path / ASSETS / "vae").decode(finals))
    return graded(load_grader(GRADER), found, [record.prompt for record in drawn])["all"]


def harvest_config(teacher_dir: Path, folder: Path) -> Path:
    config = yaml.safe_load(Path("configs/harvest/demo.yaml").read_text(encoding="utf-8"))
    config |= {"out": str(folder / "set"), "steps": STEPS, "keep": STEPS, "jitter": False, "records_per_shard": 64}
    config["teacher"] |= {"folder": str(teacher_dir), "threads": 1}
    config |= {"workers": 2}
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{scene.caption}\n" for scene in shuffled(training_scenes(), seed=11)[:NUM_PROMPTS]))
    config["prompts"] |= {"file": str(prompts), "limit": None, "seeds_per_prompt": SEEDS}
    path = folder / "harvest.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def called(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-2000:]}")
    return done.stdout
