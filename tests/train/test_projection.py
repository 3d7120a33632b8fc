"""Stripping is exact, shrinking is consistent, every tensor is accounted for, and nothing unfit is projected."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from common.errors import BadUsage, Corrupt
from tests.micro import TRANSFORMER, write_micro_ti2v, write_micro_wan
from train.student.network import StudentConfig, WanLite, load_student
from train.student.projection import project
from train.student.selection import rotary_pairs, spread, strongest

BIG = {"num_layers": 5, "attention_head_dim": 16, "num_attention_heads": 4, "ffn_dim": 96}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_micro_wan(tmp_path_factory.mktemp("teacher") / "wan", transformer=BIG)


def own_size(teacher_dir: Path) -> StudentConfig:
    return StudentConfig.from_wan_config(json.loads((teacher_dir / "transformer" / "config.json").read_text()))


def stripped(teacher_dir: Path, expert: str) -> dict[str, torch.Tensor]:
    weights = load_file(teacher_dir / expert / WEIGHTS)
    weights["patch_embedding.weight"] = weights["patch_embedding.weight"].squeeze(2)
    return weights


def velocity(student: WanLite) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, student.config.in_channels, 8, 8, generator=generator)
    text = torch.randn(2, 7, student.config.text_dim, generator=generator)
    with torch.no_grad():
        return student.eval()(latents, torch.tensor([900.0, 100.0]), text, torch.tensor([7, 4]))


@pytest.mark.parametrize(("experts", "expert"), [("high", "transformer"), ("low", "transformer_2")])
def test_same_size_strip_is_exact_for_every_tensor(
    experts: Any, expert: str, teacher_dir: Path, tmp_path: Path
) -> None:
    report = project(teacher_dir, own_size(teacher_dir), tmp_path / "init", experts=experts)
    truth = stripped(teacher_dir, expert)
    assert report.counts == {"exact": len(truth)}
    student = load_student(tmp_path / "init").state_dict()
    assert student.keys() == truth.keys() and all(torch.equal(student[name], truth[name]) for name in truth)
    assert json.loads((tmp_path / "init" / "report.json").read_text())["counts"] == report.counts


def test_mean_of_experts_is_their_average(teacher_dir: Path, tmp_path: Path) -> None:
    report = project(teacher_dir, own_size(teacher_dir), tmp_path / "init", experts="mean")
    assert set(report.counts) == {"merged"}
    high, low = stripped(teacher_dir, "transformer"), stripped(teacher_dir, "transformer_2")
    student = load_student(tmp_path / "init").state_dict()
    assert all(torch.equal(student[name], (high[name] + low[name]) / 2) for name in student)


def test_strip_then_diffusers_then_strip_is_bitwise(teacher_dir: Path, tmp_path: Path) -> None:
    project(teacher_dir, own_size(teacher_dir), tmp_path / "once", experts="low")
    student = load_student(tmp_path / "once")
    weights = student.state_dict()
    weights["patch_embedding.weight"] = weights["patch_embedding.weight"].unsqueeze(2)
    stock = WanTransformer3DModel.from_config(student.config.to_wan_config())
    stock.load_state_dict(weights, strict=True)
    stock.save_pretrained(tmp_path / "exported" / "transformer")
    project(tmp_path / "exported", student.config, tmp_path / "twice")
    again = load_student(tmp_path / "twice").state_dict()
    assert all(torch.equal(again[name], value) for name, value in student.state_dict().items())


SMALLER: dict[str, dict[str, int]] = {
    "depth": {"num_layers": 2},
    "one block": {"num_layers": 1},
    "heads": {"num_heads": 2},
    "head_dim": {"head_dim": 10},
    "ffn": {"ffn_dim": 40},
    "waves": {"freq_dim": 16},
    "all": {"num_layers": 3, "num_heads": 3, "head_dim": 12, "ffn_dim": 50},
}


@pytest.mark.parametrize("cut", list(SMALLER))
def test_a_cut_student_runs_and_every_tensor_is_a_part_of_the_teachers(
    cut: str, teacher_dir: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(own_size(teacher_dir), **SMALLER[cut])
    report = project(teacher_dir, config, tmp_path / "init", experts="low")
    student = load_student(tmp_path / "init")
    assert {tensor.name for tensor in report.tensors} == set(student.state_dict())
    assert report.counts.get("fresh", 0) == 0
    out = velocity(student)
    assert torch.isfinite(out).all() and out.std() > 0.1
    truth = stripped(teacher_dir, "transformer_2")
    for tensor in report.tensors:
        ours, theirs = student.state_dict()[tensor.name], truth[tensor.source]
        assert tensor.shape == tuple(ours.shape) and tensor.teacher_shape == tuple(theirs.shape)
        assert (tensor.kind == "exact") == torch.equal(ours, theirs)
        assert torch.isin(ours, theirs).all(), tensor.name


def test_depth_alone_keeps_whole_blocks(teacher_dir: Path, tmp_path: Path) -> None:
    report = project(teacher_dir, dataclasses.replace(own_size(teacher_dir), num_layers=3), tmp_path / "init")
    assert report.blocks == [0, 2, 4] and set(report.counts) == {"exact"}


def test_channels_that_do_nothing_are_cut_without_loss(teacher_dir: Path, tmp_path: Path) -> None:
    """A teacher padded with silent feed-forward channels and a silent head is found again under the padding."""
    wide = shutil.copytree(teacher_dir, tmp_path / "wide")
    for expert in ("transformer", "transformer_2"):
        weights = load_file(wide / expert / WEIGHTS)
        for name, value in weights.items():
            if ".ffn.net.0.proj." in name or ".ffn.net.2.weight" in name:
                value[(slice(None), slice(3, 40)) if "net.2" in name else slice(3, 40)] = 0
        save_file(weights, wide / expert / WEIGHTS, metadata={"format": "pt"})
    full = own_size(wide)
    project(wide, full, tmp_path / "full")
    project(wide, dataclasses.replace(full, ffn_dim=96 - 37), tmp_path / "cut")
    full_out, cut_out = (velocity(load_student(tmp_path / name)) for name in ("full", "cut"))
    assert (full_out - cut_out).abs().max() <= 1e-5 * full_out.std()


def test_cutting_by_norm_keeps_more_than_first_rows(teacher_dir: Path, tmp_path: Path) -> None:
    """Residual channels that nobody writes go first, wherever in the stream they lie."""
    quiet = shutil.copytree(teacher_dir, tmp_path / "quiet")
    silent = torch.arange(0, 64, 4)
    for expert in ("transformer", "transformer_2"):
        weights = load_file(quiet / expert / WEIGHTS)
        for name, value in weights.items():
            if any(part in name for part in ("patch_embedding", "to_out.0", "ffn.net.2")):
                value[silent] = 0
        save_file(weights, quiet / expert / WEIGHTS, metadata={"format": "pt"})
    project(quiet, dataclasses.replace(own_size(quiet), num_heads=3), tmp_path / "cut")
    kept = load_student(tmp_path / "cut").state_dict()["patch_embedding.weight"]
    assert kept.flatten(1).norm(dim=1).min() > 0


def test_each_block_may_have_its_own_expert(teacher_dir: Path, tmp_path: Path) -> None:
    words = ["high", "low", "mean", "low", "low"]
    report = project(teacher_dir, own_size(teacher_dir), tmp_path / "init", experts=",".join(words))
    student = load_student(tmp_path / "init").state_dict()
    high, low = (stripped(teacher_dir, name) for name in ("transformer", "transformer_2"))
    truth = {"high": high, "low": low, "mean": {name: (high[name] + low[name]) / 2 for name in high}}
    for name, tensor in student.items():
        before = name.startswith(("patch_embedding", "condition_embedder"))
        word = words[int(name.split(".")[1])] if name.startswith("blocks.") else words[0 if before else -1]
        assert torch.equal(tensor, truth[word][name]), name
    kinds = {tensor.kind for tensor in report.tensors if tensor.name.startswith("blocks.2.")}
    assert kinds == {"merged"} and set(report.counts) == {"exact", "merged"} and report.experts == ",".join(words)
    with pytest.raises(BadUsage, match=r"3 of them.*5 blocks"):
        project(teacher_dir, own_size(teacher_dir), tmp_path / "odd", experts="low,low,high")
    with pytest.raises(BadUsage, match="medium"):
        project(teacher_dir, own_size(teacher_dir), tmp_path / "odd", experts="medium")


def test_projection_factor_multiplies_matrices_only(teacher_dir: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(own_size(teacher_dir), projection_factor=0.5)
    report = project(teacher_dir, config, tmp_path / "init")
    student, truth = load_student(tmp_path / "init").state_dict(), stripped(teacher_dir, "transformer_2")
    assert torch.equal(student["proj_out.weight"], truth["proj_out.weight"] * 0.5)
    for name in ("proj_out.bias", "scale_shift_table", "blocks.0.attn1.norm_q.weight"):
        assert torch.equal(student[name], truth[name])
    assert set(report.counts) == {"exact", "selected"}


def test_shards_variants_and_single_models_are_read(tmp_path: Path) -> None:
    whole = write_micro_wan(tmp_path / "whole")
    shards = write_micro_wan(tmp_path / "shards", max_shard_size="30KB")
    half = write_micro_wan(tmp_path / "half", variant="fp16")
    assert len(list((shards / "transformer").glob("*.safetensors"))) > 1
    for folder in (whole, shards, half):
        assert set(project(folder, own_size(folder), tmp_path / f"{folder.name}-init").counts) == {"exact"}
    one, two, three = (load_student(tmp_path / f"{name}-init").state_dict() for name in ("whole", "shards", "half"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(one[name].half().float(), three[name]) for name in one)
    for folder in (write_micro_wan(tmp_path / "single", experts=1), write_micro_ti2v(tmp_path / "ti2v")):
        report = project(folder, own_size(folder), tmp_path / f"{folder.name}-init", experts="low")
        assert report.experts == "single" and set(report.counts) == {"exact"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"in_channels": 4}, "16"),
        ({"text_dim": 77}, "32"),
        ({"patch": 4}, "patch"),
        ({"num_layers": 9}, "5 or less"),
        ({"head_dim": 32}, "16 or less"),
        ({"freq_dim": 24}, "freq_dim"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_right_number(
    change: dict[str, int], said: str, teacher_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadUsage, match=said):
        project(teacher_dir, dataclasses.replace(own_size(teacher_dir), **change), tmp_path / "init")
    assert not (tmp_path / "init").exists()


def test_missing_foreign_and_rotten_tensors_are_refused(teacher_dir: Path, tmp_path: Path) -> None:
    config = own_size(teacher_dir)
    for name, fault in (("missing", BadUsage), ("foreign", BadUsage), ("rotten", Corrupt)):
        folder = shutil.copytree(teacher_dir, tmp_path / name)
        weights = load_file(folder / "transformer_2" / WEIGHTS)
        if name == "missing":
            del weights["proj_out.bias"]
        elif name == "foreign":
            weights["blocks.0.attn2.add_k_proj.weight"] = torch.zeros(2, 2)
        else:
            weights["proj_out.bias"][3] = float("nan")
        save_file(weights, folder / "transformer_2" / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(fault, match="proj"):
            project(folder, config, tmp_path / f"{name}-init")
        assert not (tmp_path / f"{name}-init" / "model.safetensors").exists()


def test_a_folder_that_is_no_teacher_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadUsage, match="model_index"):
        project(tmp_path, StudentConfig.from_wan_config(TRANSFORMER), tmp_path / "init")


def test_evenly_spread_blocks_keep_first_and_last() -> None:
    assert spread(40, 16)[0] == 0 and spread(40, 16)[-1] == 39 and len(set(spread(40, 16))) == 16
    assert spread(6, 3) == [0, 2, 5] and spread(4, 4) == [0, 1, 2, 3] and spread(5, 1) == [0]


def test_strongest_are_ascending_and_ties_go_to_the_lower() -> None:
    assert strongest(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 3]
    assert strongest(torch.ones(4), 2).tolist() == [0, 1] and strongest(torch.ones(4), 4) is None


@pytest.mark.parametrize("sizes", [(128, 64), (128, 96), (16, 12), (16, 10), (12, 10), (12, 6), (64, 62), (14, 8)])
def test_rotary_pairs_stay_pairs_in_their_own_segment(sizes: tuple[int, int], teacher_dir: Path) -> None:
    teacher, student = (dataclasses.replace(own_size(teacher_dir), head_dim=size) for size in sizes)
    channels = rotary_pairs(teacher, student)
    assert len(channels) == len(set(channels.tolist())) == sizes[1]
    assert (channels[0::2] % 2 == 0).all() and (channels[1::2] == channels[0::2] + 1).all()
    still, side, _ = teacher.rotary_split
    of_height, of_width = channels[student.rotary_split[0] :].split(student.rotary_split[1])
    assert ((of_height >= still) & (of_height < still + side)).all() and (of_width == of_height + side).all()
    if student.rotary_split[1]:
        assert of_height[0] == still  # the fastest frequency, 1, is every segment's first
