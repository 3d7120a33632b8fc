"""What a run shows and what is measured on it: pictures, the held-out gap, a grader's scores, a check before hours."""

import io
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from common.config import check as checked
from common.errors import BadUsage, Partial, Refused, Stopped
from common.shards import ShardSet, is_held_out
from tests.made import ROOT, command, harvest_config, harvest_here
from train.check import check
from train.config import TrainConfig
from train.dist import World, device_of
from train.evaluate import compared, evaluate, graded, load_grader, psnr, report_lines
from train.feed.epochs import Epochs
from train.held_out import HeldOut
from train.loop import train
from train.objective import objective_of
from train.run_folder import checkpoints, read_metrics, status_lines
from train.student.network import load_student

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def held_out_set(tmp_path_factory: pytest.TempPathFactory, micro_wan: Path) -> Path:
    """Some prompts that are never trained on among others."""
    folder = tmp_path_factory.mktemp("watched")
    numbered = [f"a cat number {number}" for number in range(300)]
    kept = [prompt for prompt in numbered if is_held_out(prompt)][:4]
    (folder / "prompts.txt").write_text("\n".join([*kept, *(p for p in numbered if not is_held_out(p))][:12]))
    return harvest_here(harvest_config(folder / "set", micro_wan, prompts={"seeds_per_prompt": 1}))


@pytest.fixture
def settings(tmp_path: Path, held_out_set: Path, micro_init: Path) -> dict[str, Any]:
    return {"set": held_out_set, "init": micro_init, "out": tmp_path / "run", "batch_size": 8, "num_epochs": 2,
            "warmup_steps": 1, "log_every": 1, "threads": 1, "device": "cpu", "deadline_s": 60}  # fmt: skip


def config(settings: dict[str, Any], **changes: Any) -> TrainConfig:
    return checked(TrainConfig, settings | changes, source="test")


def test_the_gap_is_none_where_the_student_is_its_teacher(held_out_set: Path, micro_init: Path) -> None:
    """The init is the low-noise expert at full size: without guidance its answers are that expert's own."""
    from train.chosen import held_out_records

    shards = ShardSet.open(held_out_set)
    anywhere = {"set": "s", "init": "i", "out": "o"}
    objective = objective_of(config(anywhere, guidance=[1.0, 1.0]), shards.contract)
    records = held_out_records(shards, 32)
    assert len(records) == 4 and all(is_held_out(record.prompt) for record in records)
    held_out = HeldOut(objective, records, text_rows=512, device=torch.device("cpu"))
    numbers = held_out.gap(load_student(micro_init).eval()).numbers()
    high, low = numbers["gap_by_expert"]
    assert low < 1e-5 < 0.5 < high
    assert held_out.num_points == 12
    nothing = held_out.gap(lambda latents, timesteps, text, lengths: torch.zeros_like(latents)).numbers()
    assert nothing["gap"] > 0.9, "an answer of zeros is about as good as the mean of random weights' answers"


def test_a_watched_run_is_the_run_and_shows_pictures(settings: dict[str, Any], tmp_path: Path) -> None:
    train(config(settings), ALONE)
    watched = tmp_path / "watched"
    train(config(settings, out=watched, save_samples=True, sample_dir=tmp_path / "pictures", checkpoint_every=1), ALONE)
    mine, theirs = (checkpoints(run)[-1] / "model.safetensors" for run in (settings["out"], watched))
    assert mine.read_bytes() == theirs.read_bytes()
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == [f"epoch_{epoch:04d}_sample_{number:02d}.png" for epoch in (1, 2) for number in range(8)]
    with Image.open(tmp_path / "pictures" / names[0]) as picture:
        assert picture.size == (64 * 2 + 4, 64)
    gaps = [line for line in read_metrics(watched) if line.get("event") == "held_out"]
    assert len(gaps) == 6 and gaps[-1]["gap"] < gaps[-1]["untrained_gap"] and gaps[0]["points"] == 12
    assert any("held-out gap" in line for line in status_lines(watched))


def test_a_prompt_that_the_set_does_not_hold_is_refused_at_the_start(settings: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="a unicorn"):
        train(config(settings, save_samples=True, sample_prompts=["a unicorn"]), ALONE)
    assert not checkpoints(settings["out"])


def test_named_prompts_are_drawn_in_their_order(settings: dict[str, Any], held_out_set: Path) -> None:
    from train.chosen import records_of_prompts

    shards = ShardSet.open(held_out_set)
    prompts = [record.prompt for receipt in shards.manifest().receipts for record in
               (shards.read(receipt).record(index) for index in range(receipt.num_records))]  # fmt: skip
    wanted = [prompts[7], f"  {prompts[2]} "]
    assert [record.prompt for record in records_of_prompts(shards, wanted)] == [prompts[7], prompts[2]]


def test_check_walks_through_everything_and_leaves_the_run_alone(settings: dict[str, Any]) -> None:
    check(config(settings), ALONE)
    parts = [line["part"] for line in read_metrics(settings["out"] / "check") if line.get("event") == "check"]
    assert parts == [
        "load",
        "untrained",
        "first batch",
        "forward and backward",
        "step",
        "held-out forward",
        "save",
        "sample",
    ]
    assert not checkpoints(settings["out"]) and not (settings["out"] / "epochs").exists()
    train(config(settings), ALONE)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("place", [Terminal, io.StringIO])
def test_a_bar_is_drawn_on_a_terminal_and_lines_are_said_everywhere(
    place: type[io.StringIO], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = place()
    monkeypatch.setattr("sys.stderr", shown)
    train(config(settings), ALONE)
    told = shown.getvalue()
    last = [line["step"] for line in read_metrics(settings["out"]) if "loss" in line][-1]
    assert f"step {last}/{last} loss=" in told and "left=" in told
    assert (f"m{last}/{last}\x1b" in told and "━" in told) == (place is Terminal)


def test_events_are_the_numbers_of_the_metrics(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, killed, gone on with: of a step that was said twice the later word alone is drawn."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Stopped):
        train(config(settings, tensorboard=True), ALONE, limit_s=0.0)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("train.loop.Run._save", dies)  # after the last step, and nothing is kept
        train(config(settings, tensorboard=True), ALONE)
    train(config(settings, tensorboard=True), ALONE)
    lines = [line for line in read_metrics(settings["out"]) if "step" in line]
    found = events.EventAccumulator(str(settings["out"] / "tensorboard")).Reload()
    for event, name in (("train", "loss"), ("train", "lr"), ("train", "samples_per_s"), ("held_out", "gap")):
        told = {line["step"]: line[name] for line in lines if line.get("event", "train") == event and name in line}
        points = found.Scalars(f"{event}/{name}")
        assert told and {point.step: point.value for point in points} == pytest.approx(told, rel=1e-6), name
        assert len(points) == len(told), f"{name}: a step that was said twice is drawn twice"
    levels = {line["step"]: line["loss_by_level"][3] for line in lines if "loss_by_level" in line}
    drawn = {point.step: point.value for point in found.Scalars("train/loss_by_level3")}
    assert drawn == pytest.approx({step: loss for step, loss in levels.items() if loss is not None}, rel=1e-6)
    assert "train/first_sample" not in found.Tags()["scalars"]


@pytest.mark.parametrize(("package", "key", "value"), [("tensorboard", "tensorboard", True), ("peft", "lora", {})])
def test_without_its_package_a_wish_names_the_extra_before_anything_is_loaded(
    package: str, key: str, value: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    values = settings | {key: value, "set": "nowhere", "out": str(tmp_path / "run"), "init": "nowhere"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    code = f"import runpy, sys; sys.modules['{package}'] = None; sys.argv = ['train', 'run', sys.argv[1]]\n"
    code += "try: runpy.run_module('train', run_name='__main__')\n"
    code += "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.yaml")], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.stdout.split() == ["2", "False"] and f".[{key}]" in done.stderr
    assert not (tmp_path / "run").exists()


def by_mean(picture: np.ndarray, prompt: str) -> dict[str, Any]:
    return {"bright": bool(picture.mean() > 127), "named": prompt.startswith("a cat"), "text": "not a number"}


def test_a_grader_found_by_name_scores_both(settings: dict[str, Any]) -> None:
    train(config(settings), ALONE)
    grader = load_grader("tests.train.test_watching:by_mean")
    report = evaluate(settings["out"], num=5, steps=3, grader=grader)
    assert report["records"] == 5 and report["records_held_out"] == 4 and report["steps"] == 3
    last = [line for line in read_metrics(settings["out"]) if line.get("event") == "held_out"][-1]
    assert report["held_out"]["gap"] == pytest.approx(last["gap"], rel=1e-5), "both look at the moving average"
    assert report["held_out"]["untrained"]["gap"] == pytest.approx(last["untrained_gap"], rel=1e-5)
    assert set(report["graded"]) == {"bright", "named"} and report["graded"]["named"]["ratio"] == 1.0
    assert "named: student 1.000, teacher 1.000, ratio 1.000" in report_lines(report)
    assert json.dumps(report)
    for name in ("tests.train.test_watching:nobody", "nowhere.to.be:found", "nothing"):
        with pytest.raises(BadUsage, match="module:function"):
            load_grader(name)


def test_scores_are_means_and_ratios() -> None:
    pictures = np.zeros((4, 2, 2, 3), np.uint8)
    pictures[0] = 255
    assert graded(by_mean, pictures, ["a cat"] * 4) == {"bright": 0.25, "named": 1.0}
    assert compared({"a": 0.2}, {"a": 0.0})["a"]["ratio"] is None
    assert psnr(pictures[0], pictures[1]) == 0.0 and psnr(pictures[1], pictures[1]) > 50


def test_an_epoch_waits_for_a_shard_and_then_goes_on_without(settings: dict[str, Any], held_out_set: Path,
                                                             tmp_path: Path) -> None:  # fmt: skip
    import shutil

    growing = tmp_path / "growing"
    shutil.copytree(held_out_set, growing)
    shards = ShardSet.open(growing)
    late = [shards.receipt_path(receipt.item) for receipt in shards.manifest().receipts[1:]]
    away = [path.rename(path.with_suffix(".away")) for path in late]
    with pytest.raises(Partial, match="holds no shard yet"):
        empty = tmp_path / "empty"
        shutil.copytree(growing, empty, ignore=shutil.ignore_patterns("receipts"))
        (empty / "receipts").mkdir()
        Epochs(ShardSet.open(empty), tmp_path / "e", rank=0, follow_s=0.2).freeze(0)
    with pytest.raises(Stopped, match="no shard was committed yet"):
        Epochs(ShardSet.open(empty), tmp_path / "e", rank=0, follow_s=60, stopping=lambda: True).freeze(0)
    epochs = Epochs(shards, tmp_path / "epochs", rank=0, follow_s=5.0)
    assert len(epochs.freeze(0)) == 1
    threading.Timer(0.6, lambda: away[0].rename(late[0])).start()
    began = time.monotonic()
    assert len(epochs.freeze(1)) == 2 and 0.4 < time.monotonic() - began < 4
    patient = Epochs(shards, tmp_path / "epochs", rank=0, follow_s=0.5)
    assert len(patient.freeze(2)) == 2
    began = time.monotonic()
    assert len(patient.freeze(3)) == 2 and time.monotonic() - began < 0.4, "the harvest is over: nobody waits twice"


def test_a_sample_that_was_added_later_can_be_drawn(tmp_path: Path, micro_config: Any, micro_set: Path) -> None:
    """Drawn by the teacher after the harvest; training finds its text and its picture in the set."""
    from tests.harvest.test_resume import as_file
    from train.chosen import records_of_prompts

    shutil.copytree(micro_set, tmp_path / "set")
    config = as_file(micro_config.model_copy(update={"out": tmp_path / "set"}), tmp_path / "c.yaml")
    shards = ShardSet.open(tmp_path / "set")
    with pytest.raises(Refused, match="add-samples"):
        records_of_prompts(shards, ["a blue house in the sea"])
    done = command("harvest", "add-samples", tmp_path / "set", config, "--prompt", "a blue house in the sea")
    assert done.returncode == 0, done.stderr
    (record,) = records_of_prompts(shards, ["a blue  house in the sea"])
    assert record.prompt == "a blue house in the sea" and record.final.std() > 0


def test_a_device_is_found_or_named(settings: dict[str, Any], tmp_path: Path) -> None:
    has_gpu = torch.cuda.is_available()
    assert device_of(None).type == ("cuda" if has_gpu else "cpu") and device_of("cpu").type == "cpu"
    for name, found in (("gpu", "gpu"), ("cuda:x", "cuda:x"), ("cuda:99", f"{torch.cuda.device_count()} GPUs")):
        with pytest.raises(BadUsage) as fault:
            device_of(name)
        assert "--device" in fault.value.wrong and fault.value.found == found
    train(config(settings, num_epochs=0.4), ALONE)
    done = command("train", "eval", settings["out"], "--num", "2", "--steps", "2", "--device", "cpu", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["records"] == 2, done.stderr
