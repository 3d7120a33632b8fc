"""A run that is killed goes on to the same bits; two ranks see what one sees; the teacher is nowhere."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.made import ROOT, command, started

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def config(micro_set: Path, micro_init: Path) -> dict[str, Any]:
    """69 training points (held-out prompts aside) for 200 steps of 8."""
    return {"set": str(micro_set), "init": str(micro_init), "batch_size": 4, "global_batch": 8, "num_epochs": 23,
            "lr": 1e-3, "warmup_steps": 5, "checkpoint_every": 40, "log_every": 20, "threads": 1,
            "device": "cpu"}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    done = command("train", "run", written(folder, config))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def written(folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(config | {"out": str(folder / "run")} | changes), encoding="utf-8")
    return path


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("[0-9]*"))


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def wait_for(pattern: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while not any(pattern.parent.glob(pattern.name)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)


def test_killed_and_run_again_is_bitwise_the_same(tmp_path: Path, config: dict[str, Any], uninterrupted: Path) -> None:
    path = written(tmp_path, config)
    process = started("train", "run", path)
    wait_for(tmp_path / "run" / "checkpoints" / "[0-9]*", process)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert int(newest(tmp_path / "run").name) < int(newest(uninterrupted).name), "it was over before it was killed"
    again = command("train", "run", path)
    assert again.returncode == 0 and "resumed from" in again.stderr
    assert newest(tmp_path / "run").name == newest(uninterrupted).name
    for name in FILES:
        assert (newest(tmp_path / "run") / name).read_bytes() == (newest(uninterrupted) / name).read_bytes(), name


def test_asked_to_stop_it_saves_and_goes_on(tmp_path: Path, config: dict[str, Any], uninterrupted: Path) -> None:
    path = written(tmp_path, config, checkpoint_every=1000)
    process = started("train", "run", path)
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert command("train", "run", path).returncode == 0
    for name in FILES:
        assert (newest(tmp_path / "run") / name).read_bytes() == (newest(uninterrupted) / name).read_bytes(), name


def test_the_student_learns(uninterrupted: Path) -> None:
    losses = [m["loss"] for m in metrics(uninterrupted)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_no_run_begins_from_a_damaged_init(tmp_path: Path, config: dict[str, Any], micro_init: Path, name: str) -> None:
    damaged = shutil.copytree(micro_init, tmp_path / "init")
    data = bytearray((damaged / name).read_bytes())
    data[-9] ^= 1  # the last number's least bit; a digit of a size
    (damaged / name).write_bytes(data)
    done = command("train", "run", written(tmp_path, config, init=str(damaged)))
    assert done.returncode == 5 and f"{damaged / name} is not what was left there" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_no_teacher_in_memory_nor_on_disk(tmp_path: Path, config: dict[str, Any], micro_set: Path) -> None:
    """From a read-only copy of the set; neither diffusers nor transformers nor zarr is ever imported."""
    copied = tmp_path / "set"
    shutil.copytree(micro_set, copied)
    for path in copied.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    path = written(tmp_path, config, set=str(copied), num_epochs=1)
    strangers = "{'diffusers', 'transformers', 'zarr', 'webdataset'}"
    code = "import runpy, sys; sys.argv = sys.argv[1:]\ntry: runpy.run_module('train', run_name='__main__')\n"
    code += f"except SystemExit: pass\nprint(sorted({strangers} & set(sys.modules)))"
    sample = ["train", "sample", str(tmp_path / "run"), "--out", str(tmp_path / "p.png"), "--num", "3", "--steps", "2"]
    for words in (["train", "run", str(path)], sample):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert (tmp_path / "p.png").stat().st_size > 500


@pytest.mark.parametrize(("changes", "code", "what"), [
    ({"init": "nowhere"}, 2, "python -m train init"),
    ({"set": "nowhere"}, 2, "is no shard set"),
    ({"batch_size": 3}, 2, "set global_batch to 6 or 9"),
    ({"lrr": 3}, 2, "did you mean 'lr'"),
])  # fmt: skip
def test_a_mistake_is_one_line(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], code: int, what: str
) -> None:
    done = command("train", "run", written(tmp_path, config, **changes))
    assert done.returncode == code and what in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_another_set_under_the_same_run_is_refused(tmp_path: Path, config: dict[str, Any], uninterrupted: Path,
                                                   micro_set: Path) -> None:  # fmt: skip
    shutil.copytree(uninterrupted, tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(micro_set, other)
    contract = json.loads((other / "contract.json").read_bytes())
    (other / "contract.json").write_text(json.dumps(contract | {"guidance": [9.0, 9.0]}))
    done = command("train", "run", written(tmp_path, config, set=str(other)))
    assert done.returncode == 4 and "another contract" in done.stderr


def test_the_same_grid_and_noise_give_the_teachers_picture(micro_set: Path, micro_init: Path, micro_wan: Path) -> None:
    """A same-size student of one expert, walked without guidance, is the stock pipeline with that expert alone."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    from common.schedule import flow_match_grid, seeded_noise
    from common.shards import ShardSet
    from train.chosen import first_records
    from train.sample import draw
    from train.student.network import load_student

    records = first_records(ShardSet.open(micro_set), 3)
    student = load_student(micro_init, collapse_padding=False).eval()
    latents = draw(student, records, flow_match_grid(5, 3.0), torch.device("cpu"))
    pipeline = WanPipeline.from_pretrained(micro_wan, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer, pipeline.transformer_2 = pipeline.transformer_2, None
    pipeline.register_to_config(boundary_ratio=None)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    embeds = torch.zeros(3, 512, 32)
    for row, record in zip(embeds, records, strict=True):
        row[: len(record.text)] = torch.from_numpy(record.text.astype(np.float32))
    noise = torch.from_numpy(np.stack([seeded_noise(record.seed, record.final.shape) for record in records]))
    settings = {"height": 64, "width": 64, "num_frames": 1, "num_inference_steps": 5, "guidance_scale": 1.0}
    drawn = pipeline(prompt_embeds=embeds, latents=noise.unsqueeze(2), output_type="latent", **settings)
    theirs = drawn.frames.squeeze(2)
    torch.testing.assert_close(latents, theirs, rtol=0, atol=0)


@pytest.fixture(autouse=True, scope="module")
def _diffusers_is_quiet() -> Iterator[None]:
    from diffusers.utils import logging

    logging.disable_progress_bar()
    yield
