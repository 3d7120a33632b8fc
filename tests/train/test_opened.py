"""Whoever draws, measures or exports a checkpoint takes its meaning from what is sealed, or is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from common.errors import Refused
from common.shards import ShardSet
from tests.made import trained_here
from train.evaluate import evaluate
from train.export import export
from train.lora import base_digest
from train.run_folder import CONFIG_NAME, MODEL_NAME, checkpoints
from train.sample import open_run, sample
from train.state import SEAL, STATE_NAME, _seal, verified
from train.student.network import WEIGHTS_NAME
from train.texts import draw_words

LOOKS: dict[str, Callable[[Path, Path], object]] = {
    "sample": lambda run, _: sample(run, num=2, steps=2),
    "words": lambda run, folder: draw_words(run, ["a red cat"], folder / "no encoder", seed=0, steps=2),
    "eval": lambda run, _: evaluate(run, num=2, steps=2, grader=None),
    "export": lambda run, folder: export(run, folder / "out", form="diffusers"),
}


def settings(folder: Path, init: Path) -> dict[str, Any]:
    return {"set": folder / "set", "init": init, "out": folder / "run", "batch_size": 8, "num_epochs": 0.3,
            "checkpoint_every": 2, "threads": 1, "device": "cpu", "lr": 1e-2, "warmup_steps": 1,
            "ema_decay": 0.5}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, micro_set: Path, micro_init: Path) -> Path:
    """A folder with a set and the run that was trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(micro_set, folder / "set")
    trained_here(settings(folder, micro_init))
    return folder


@pytest.fixture
def folder(tmp_path: Path, trained: Path) -> Path:
    """Of one's own: its set and its run may be spoiled."""
    shutil.copytree(trained, tmp_path / "own")
    tell(tmp_path / "own/run", set=str(tmp_path / "own/set"))
    return tmp_path / "own"


def tell(run: Path, **changes: Any) -> None:
    told = yaml.safe_load((run / CONFIG_NAME).read_text())
    (run / CONFIG_NAME).write_text(yaml.safe_dump(told | changes))


def resealed(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The newest checkpoint as one that says something else of itself, or less."""
    path = checkpoints(run)[-1] / STATE_NAME
    summary = json.loads(path.read_bytes())
    del summary[SEAL]
    change(summary)
    path.write_text(json.dumps(summary | {SEAL: _seal(summary)}))


@pytest.mark.parametrize("look", list(LOOKS))
def test_one_bit_in_the_contract_is_refused_by_whoever_looks(look: str, folder: Path) -> None:
    path = folder / "set/contract.json"
    was = ShardSet.open(folder / "set").contract.digest()
    altered = path.read_bytes().replace(b'"shift": 3.0', b'"shift": 2.0')
    assert altered != path.read_bytes()
    path.write_bytes(altered)
    with pytest.raises(Refused, match="another contract") as fault:
        LOOKS[look](folder / "run", folder)
    assert was[:16] in fault.value.found
    assert ShardSet.open(folder / "set").contract.digest()[:16] in fault.value.found
    assert not (folder / "out").exists()


def test_where_things_lie_is_said_by_the_run_and_all_else_by_the_checkpoint(folder: Path, trained: Path) -> None:
    """One wrong digit in config.yaml, and a set that was moved."""
    (folder / "set").rename(folder / "moved")
    tell(folder / "run", set=str(folder / "moved"), objective="segment", guidance=[1.0, 1.0], batch_size=1)
    opened, before = open_run(folder / "run"), open_run(trained / "run")
    assert opened.shards.path == folder / "moved" and opened.config.set == folder / "moved"
    assert opened.objective == before.objective and opened.config.batch_size == 8
    mine, theirs = (sample(run, num=2, steps=2) for run in (folder / "run", trained / "run"))
    assert np.array_equal(np.asarray(mine), np.asarray(theirs))


def test_one_digit_in_config_yaml_exports_the_same_adapters(tmp_path: Path, trained: Path, micro_init: Path) -> None:
    pytest.importorskip("peft")
    lora = {"rank": 4, "alpha": 16.0}
    run = trained_here(settings(trained, micro_init), out=tmp_path / "run", lora=lora)
    export(run, tmp_path / "before", form="wanlite")
    tell(run, lora=lora | {"alpha": 17.0, "targets": ["to_q"]})
    export(run, tmp_path / "after", form="wanlite")
    before, after = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("before", "after"))
    first = load_file(micro_init / WEIGHTS_NAME)
    assert any(not torch.equal(before[name], first[name]) for name in first)
    assert all(torch.equal(before[name], after[name]) for name in first)


def test_a_checkpoint_of_the_first_releases_opens(folder: Path) -> None:
    def forget(summary: dict[str, Any]) -> None:
        for name in ("config", "contract", "base"):
            del summary[name]

    before = sample(folder / "run", num=2, steps=2)
    resealed(folder / "run", forget)
    assert np.array_equal(np.asarray(sample(folder / "run", num=2, steps=2)), np.asarray(before))
    export(folder / "run", folder / "out", form="diffusers")


def test_every_checkpoint_says_which_init_its_run_began_with(folder: Path, micro_init: Path) -> None:
    """Also after it went on from a checkpoint, with another student where its init had been."""
    began = base_digest(micro_init)
    assert verified(checkpoints(folder / "run")[-1], MODEL_NAME)["base"] == began
    export(folder / "run", folder / "other", form="wanlite")
    assert base_digest(folder / "other") != began
    last = checkpoints(folder / "run")[-1]
    shutil.rmtree(last)
    assert checkpoints(folder / "run"), "an older one, to go on from"
    trained_here(settings(folder, folder / "other"))
    assert checkpoints(folder / "run")[-1] == last
    assert verified(checkpoints(folder / "run")[-1], MODEL_NAME)["base"] == began
