"""A student that does not fit its set is told the right numbers, or mended; a fresh one predicts nothing at first."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import Refused
from common.shards import ShardSet
from tests.made import command, harvest_config, harvest_here, trained_here, write_student_json
from tests.micro_sd import write_micro_sd
from train.student.config import read_student_json
from train.student.fitting import fitted
from train.student.network import load_student
from train.student.projection import project, tensor_shapes

ODD = {"num_channels": 4, "text_encoder_output_dim": 77}


def test_what_differs_is_refused_with_the_right_numbers(tmp_path: Path, micro_set: Path) -> None:
    odd = write_student_json(tmp_path / "odd.json", **ODD)
    with pytest.raises(Refused, match=r"num_channels 4, the set wants 16.*output_dim 77, the set wants 32"):
        fitted(odd, ShardSet.open(micro_set))


def test_a_student_of_another_text_length_is_refused_where_it_is_trained(
    tmp_path: Path, micro_set: Path, micro_wan: Path
) -> None:
    """It would be attended by fewer rows of padding than its teacher was."""
    odd = read_student_json(write_student_json(tmp_path / "odd.json", text_padded_length=77))
    project(micro_wan, odd, tmp_path / "init")
    with pytest.raises(
        Refused, match=r"text_padded_length; found: 77.* 512; do: set text_padded_length to 512"
    ) as told:
        trained_here({"set": micro_set, "init": tmp_path / "init", "out": tmp_path / "run", "device": "cpu"})
    assert "--adapt" in told.value.mend and "--set" in told.value.mend


def test_adapt_writes_the_mended_file_and_goes_on(tmp_path: Path, micro_set: Path, micro_wan: Path) -> None:
    odd = write_student_json(tmp_path / "odd.json", **ODD)
    words = ("train", "init", "--teacher", micro_wan, "--student", odd, "--out", tmp_path / "init", "--set", micro_set)
    refused = command(*words)
    assert refused.returncode == 4 and "--adapt" in refused.stderr
    done = command(*words, "--adapt")
    assert done.returncode == 0, done.stderr
    mended = read_student_json(tmp_path / "init/student.json")
    assert (mended.in_channels, mended.text_dim) == (16, 32)
    assert load_student(tmp_path / "init").config == mended


def test_a_set_of_no_wan_teacher_has_its_fresh_student(tmp_path: Path) -> None:
    """Stable Diffusion: 4 channels, tokens for padding, another text length."""
    folder = write_micro_sd(tmp_path / "sd", prediction_type="v_prediction")
    harvest_here(harvest_config(tmp_path / "set", folder, guidance=(5.0,), prompts={"limit": 4}))
    student = write_student_json(tmp_path / "s.json")
    done = command("train", "init", "--fresh", "--adapt", "--student", student, "--set", tmp_path / "set", "--out",
                   tmp_path / "init")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "init/report.json").read_text())
    assert report["counts"] == {"fresh": len(report["tensors"])}
    fresh = load_student(tmp_path / "init").eval()
    contract = ShardSet.open(tmp_path / "set").contract
    assert (fresh.config.in_channels, fresh.config.text_dim) == (contract.latent_channels, contract.text_dim)
    assert fresh.config.text_length == contract.text_length
    latents = torch.randn(2, contract.latent_channels, 8, 8)
    text = torch.randn(2, 5, contract.text_dim)
    assert not fresh(latents, torch.tensor([900.0, 3.0]), text, torch.tensor([5, 5])).any()


def test_a_fresh_start_is_the_same_every_time(tmp_path: Path, micro_set: Path) -> None:
    from train.student.fresh import start_fresh

    student = read_student_json(write_student_json(tmp_path / "s.json"))
    torch.manual_seed(1)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    start_fresh(student, tmp_path / "a")
    assert torch.equal(torch.rand(1), drawn), "the caller's own randomness is left alone"
    start_fresh(student, tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("name", "billions"), [("0.3b", 0.3), ("0.7b", 0.7), ("1.4b", 1.4)])
def test_a_presets_name_says_its_size(name: str, billions: float) -> None:
    student = read_student_json(Path(f"configs/students/wan_lite_{name}.json"))
    num = sum(torch.Size(shape).numel() for shape in tensor_shapes(student).values())
    assert abs(num / 1e9 - billions) < 0.05 and student.head_dim == 128 and student.freq_dim == 256


def test_neither_or_both_ways_to_begin_is_a_mistake(tmp_path: Path, micro_wan: Path) -> None:
    student = write_student_json(tmp_path / "s.json")
    for words in ((), ("--fresh",), ("--fresh", "--teacher", micro_wan)):
        done = command("train", "init", "--student", student, "--out", tmp_path / "init", *words)
        assert done.returncode == 2 and "--teacher DIR" in done.stderr
