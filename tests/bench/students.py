"""Students of the shapes teacher, from one harvest: what they keep of their teacher's score, by size and by samples.

    lines = run(teacher_dir, folder, samples=60_000, only=["1/4", "1/4 in 4 steps"])

harvest (every step of 8 kept) -> for each student: train init -> train run -> train eval --grader, all through the
command lines, one after the other. The grader's scores are of the set's records, held-out captions first; the
teacher's own pictures of the same noise are graded beside.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.shapes.draw import shuffled, training_scenes

NUM_PROMPTS, SEEDS, STEPS = 1200, 2, 8
GRADER = "tests.shapes.grade:grade"
HALF = {"hidden_size": 192, "num_heads": 4, "depth": 3, "ffn_dim": 592}
QUARTER = {"hidden_size": 144, "num_heads": 3, "depth": 3, "ffn_dim": 280}
EIGHTH = {"hidden_size": 96, "num_heads": 2, "depth": 3, "ffn_dim": 240}
STUDENTS: dict[str, tuple[dict[str, int], dict[str, Any], bool]] = {
    "1/2": (HALF, {}, False),
    "1/4": (QUARTER, {}, False),
    "1/8": (EIGHTH, {}, False),
    "1/4, random start": (QUARTER, {}, True),
    "1/4 in 4 steps": (QUARTER, {"objective": "segment", "segments": 4}, False),
}
"""Architecture, changes of the training configuration, whether it starts without the teacher's weights."""


def run(teacher_dir: Path, folder: Path, *, samples: int, only: Sequence[str]) -> Iterator[str]:
    began = time.monotonic()
    config = harvest_config(teacher_dir, folder)
    called("harvest", "run", str(config))
    yield f"harvest: {NUM_PROMPTS * SEEDS * STEPS} points in {(time.monotonic() - began) / 60:.1f} min"
    yield "| student | parameters | samples | minutes | forwards | score | of its teacher's |\n" + "|---" * 7 + "|"
    for name in only or STUDENTS:
        yield one(name, teacher_dir, folder, samples)


def one(name: str, teacher_dir: Path, folder: Path, samples: int) -> str:
    shape, changes, fresh = STUDENTS[name]
    place = folder / name.replace("/", "-").replace(" ", "_").replace(",", "")
    place.mkdir(parents=True, exist_ok=True)
    student = place / "student.json"
    demo = {"num_channels": 16, "image_size": 128, "patch_size": 16, "text_encoder_output_dim": 96}
    student.write_text(json.dumps(shape | demo))
    start = ["--fresh"] if fresh else ["--teacher", str(teacher_dir)]
    called(
        "train", "init", *start, "--student", str(student), "--set", str(folder / "set"), "--out", str(place / "init")
    )
    num_points = changes.get("segments", STEPS) * NUM_PROMPTS * SEEDS * 0.98
    config = yaml.safe_load(Path("configs/train/demo.yaml").read_text(encoding="utf-8")) | changes
    config |= {"set": str(folder / "set"), "init": str(place / "init"), "out": str(place / "run"), "ema_decay": 0.998}
    config |= {"num_epochs": samples / num_points, "log_every": 100, "checkpoint_every": 100_000}
    path = place / "train.yaml"
    path.write_text(yaml.safe_dump(config))
    began = time.monotonic()
    called("train", "run", str(path))
    minutes = (time.monotonic() - began) / 60
    report = json.loads(called("train", "eval", str(place / "run"), "--num", "256", "--grader", GRADER, "--json"))
    graded = report["graded"]["all"]
    num = sum(
        tensor_size(tensor["shape"]) for tensor in json.loads((place / "init/report.json").read_text())["tensors"]
    )
    return (f"| {name} | {num / 1e6:.2f} M | {samples} | {minutes:.1f} | {report['steps']} | {graded['student']:.3f} "
            f"| {graded['ratio']:.3f} |")  # fmt: skip


def harvest_config(teacher_dir: Path, folder: Path) -> Path:
    config = yaml.safe_load(Path("configs/harvest/demo.yaml").read_text(encoding="utf-8"))
    config |= {"out": str(folder / "set"), "steps": STEPS, "keep": STEPS, "jitter": False, "records_per_shard": 64}
    config["teacher"]["folder"] = str(teacher_dir)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{scene.caption}\n" for scene in shuffled(training_scenes(), seed=11)[:NUM_PROMPTS]))
    config["prompts"] |= {"file": str(prompts), "limit": None, "seeds_per_prompt": SEEDS}
    path = folder / "harvest.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def tensor_size(shape: Sequence[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def called(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-2000:]}")
    return done.stdout
