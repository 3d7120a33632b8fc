"""Prompts that training will draw, and prompts whose end the teacher does not see."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import BadUsage, Refused
from common.shards import ASSETS, ShardSet
from harvest.first_student import leave_student
from harvest.granary.add_samples import add_samples
from harvest.samples import SAMPLES
from tests.harvest.test_resume import as_file
from tests.made import PROMPTS, command, harvest_config, harvest_here, tree, write_student_json


def test_samples_are_drawn_first_and_are_records_like_any_other(
    tmp_path: Path, micro_wan: Path, micro_set: Path
) -> None:
    """What is drawn for a prompt is what a harvest of that prompt alone records: text, seed, end point, points."""
    config = harvest_config(tmp_path / "set", micro_wan, samples=("a  blue sea", "a white star"))
    shards = ShardSet.open(harvest_here(config))
    samples = ShardSet.open(shards.path / ASSETS / SAMPLES)
    (receipt,) = samples.manifest().receipts
    drawn = {record.prompt: record for record in (samples.read(receipt).record(i) for i in range(2))}
    assert set(drawn) == {"a blue sea", "a white star"} and samples.contract == shards.contract
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "prompts.txt").write_text("a blue sea\na white star", encoding="utf-8")
    alone = ShardSet.open(
        harvest_here(harvest_config(tmp_path / "two" / "set", micro_wan, prompts={"seeds_per_prompt": 1}))
    )
    for number in range(2):
        record = alone.read(alone.manifest().receipts[0]).record(number)
        assert drawn[record.prompt].digest() == record.digest()
    assert tree(shards.path, without=("runs", "assets")) == tree(micro_set, without=("runs", "assets"))


def test_samples_are_added_to_a_set_that_is_done_without_its_vae(tmp_path: Path, micro_wan: Path) -> None:
    config = harvest_config(tmp_path / "set", micro_wan, prompts={"limit": 2}, source="renoise")
    out = harvest_here(config)
    before = tree(out, without=("runs", "assets"))
    path = as_file(config, tmp_path / "c.yaml")
    done = command("harvest", "add-samples", out, path, "--prompt", "a white star", "--prompt", PROMPTS[0])
    assert done.returncode == 0, done.stderr
    assert "2 samples drawn, 2 in" in done.stdout and "VAE" not in done.stderr
    assert tree(out, without=("runs", "assets")) == before
    samples = ShardSet.open(out / ASSETS / SAMPLES)
    (receipt,) = samples.manifest().receipts
    first = samples.read(receipt).record(0)
    assert samples.contract.source == "trajectory" and first.prompt == "a white star"
    assert np.isfinite(first.final).all()
    before = tree(out)
    folder_gone = config.model_copy(update={"samples": ("a white star",)})
    assert list(add_samples(config, out, ["a white star"])) == [f"0 samples drawn, 2 in {out / ASSETS / SAMPLES}"]
    assert harvest_here(folder_gone) == out and tree(out) == before  # what is there is not drawn again
    with pytest.raises(BadUsage, match="prompt is empty"):
        list(add_samples(config, out, [" "]))
    with pytest.raises(Refused, match=r"steps: 6 \| 7"):
        list(add_samples(config.model_copy(update={"steps": 7}), out, ["another"]))


def test_prompts_that_are_too_long_are_counted_and_said_once(
    tmp_path: Path, micro_wan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "a red cat " * 200  # three tokens each time, and one that ends it
    (tmp_path / "prompts.txt").write_text(f"a dog\n{long} one\n{long} two\n" + "a cat " * 255, encoding="utf-8")
    shards = ShardSet.open(harvest_here(harvest_config(tmp_path / "set", micro_wan)))
    said = [line for line in capsys.readouterr().err.splitlines() if "are cut" in line]
    assert len(said) == 1 and "2 of 4 prompts are longer than the 512 tokens" in said[0]
    rows = [
        record_rows
        for receipt in shards.manifest().receipts
        for record_rows in shards.read(receipt).header.text_lengths
    ]
    assert rows.count(512) >= 2 and 511 in rows


def test_a_run_leaves_a_students_first_weights(tmp_path: Path, micro_wan: Path) -> None:
    config = harvest_config(tmp_path / "set", micro_wan, prompts={"limit": 2})
    student = write_student_json(tmp_path / "little.json")
    done = command("harvest", "run", as_file(config, tmp_path / "c.yaml"), "--student", student)
    assert done.returncode == 0, done.stderr
    init = tmp_path / "set" / ASSETS / "init" / "little"
    assert {path.name for path in init.iterdir()} == {"config.json", "model.safetensors", "report.json", "seals"}
    state = tree(init)
    assert leave_student(config, student) == init and tree(init) == state
    with pytest.raises(Refused, match="the records are whole"):
        leave_student(config, write_student_json(tmp_path / "wrong.json", text_encoder_output_dim=33))
