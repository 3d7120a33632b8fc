"""Wan's original layout: its own names, read to the very tensors that diffusers' converter makes of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import BadUsage, Refused
from harvest.loading.folder import resolve
from harvest.loading.prepare import prepare
from harvest.loading.weights import load_model
from tests.harvest.test_loading import identity
from tests.made import harvest_config, harvest_here, tree
from tests.micro import TRANSFORMER, write_micro_ti2v, write_micro_wan

# Written from Wan's model.py, the other way round from what the product does.
IN_BLOCK = {
    "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o", "attn1.norm_q": "self_attn.norm_q", "attn1.norm_k": "self_attn.norm_k",
    "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k", "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o", "attn2.norm_q": "cross_attn.norm_q", "attn2.norm_k": "cross_attn.norm_k",
    "norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "scale_shift_table": "modulation",
}  # fmt: skip
TOP = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2", "proj_out": "head.head",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0", "scale_shift_table": "head.modulation",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2", "patch_embedding": "patch_embedding",
}  # fmt: skip


def original_name(name: str) -> str:
    prefix, table = "", TOP
    if name.startswith("blocks."):
        _, number, name = name.split(".", 2)
        prefix, table = f"blocks.{number}.", IN_BLOCK
    stem = next(old for old in table if name == old or name.startswith(f"{old}."))
    return prefix + table[stem] + name[len(stem) :]


def write_original(part: Path, folder: Path, *, model_type: str = "t2v") -> None:
    weights = load_file(part / "diffusion_pytorch_model.safetensors")
    folder.mkdir(parents=True)
    save_file({original_name(name): tensor for name, tensor in weights.items()},
              folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})  # fmt: skip
    ours: dict[str, Any] = json.loads((part / "config.json").read_text())
    heads, head_dim = ours["num_attention_heads"], ours["attention_head_dim"]
    config = {"_class_name": "WanModel", "_diffusers_version": "0.33.0", "dim": heads * head_dim, "eps": ours["eps"],
              "ffn_dim": ours["ffn_dim"], "freq_dim": ours["freq_dim"], "in_dim": ours["in_channels"],
              "model_type": model_type, "num_heads": heads, "num_layers": ours["num_layers"],
              "out_dim": ours["out_channels"], "text_len": 512}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_micro_wan(tmp_path_factory.mktemp("whole") / "wan")


@pytest.fixture
def original(whole: Path, tmp_path: Path) -> Path:
    """The experts alone, and beside them what the official download has too: pickles."""
    write_original(whole / "transformer", tmp_path / "original" / "high_noise_model")
    write_original(whole / "transformer_2", tmp_path / "original" / "low_noise_model")
    (tmp_path / "original" / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"a pickle")
    return tmp_path / "original"


@pytest.fixture
def rest(whole: Path, tmp_path: Path) -> Path:
    """A diffusers folder without a byte of an expert."""
    shutil.copytree(whole, tmp_path / "rest", ignore=shutil.ignore_patterns("transformer*"))
    return tmp_path / "rest"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["transformer", "transformer_2"])
def test_weights_are_those_of_the_diffusers_folder_and_of_its_own_converter(
    whole: Path, original: Path, rest: Path, name: str, dtype: torch.dtype
) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    mine = load_model(resolve(original, "auto", rest).components[name], dtype)
    assert identity(mine) == identity(load_model(resolve(whole, "auto").components[name], dtype))
    part = original / {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}[name]
    converted = convert_wan_transformer_to_diffusers(load_file(part / "diffusion_pytorch_model.safetensors"))
    assert mine.state_dict().keys() == converted.keys()
    for key, tensor in mine.state_dict().items():
        assert torch.equal(tensor, converted[key].to(tensor.dtype)), key


def test_a_ti2v_in_one_folder(tmp_path: Path) -> None:
    folder = write_micro_ti2v(tmp_path / "ti2v")
    write_original(folder / "transformer", tmp_path / "original", model_type="ti2v")
    part = resolve(tmp_path / "original", "auto", folder).components["transformer"]
    assert part.kind == "original" and part.config["in_channels"] == 48
    whole = load_model(resolve(folder, "auto").components["transformer"], torch.bfloat16)
    assert identity(load_model(part, torch.bfloat16)) == identity(whole)


def test_config_json_is_said_in_diffusers_words(original: Path, rest: Path) -> None:
    config = resolve(original, "auto", rest).components["transformer_2"].config
    assert config == {key: list(value) if isinstance(value, tuple) else value for key, value in TRANSFORMER.items()}


@pytest.mark.parametrize("prepared", [False, True])
def test_a_harvest_from_it_is_the_same_set(
    original: Path, rest: Path, whole: Path, tmp_path: Path, prepared: bool
) -> None:
    def harvested(name: str, teacher: dict[str, Any]) -> dict[str, str]:
        config = harvest_config(tmp_path / name / "set", teacher.pop("folder"), teacher=teacher, prompts={"limit": 3})
        return tree(harvest_here(config))

    ready = {"prepared": tmp_path / "ready"} if prepared else {}
    assert harvested("a", {"folder": original, "rest": rest, **ready}) == harvested("b", {"folder": whole})


def test_what_it_lacks_is_asked_for_and_pickles_are_named(original: Path, rest: Path, tmp_path: Path) -> None:
    with pytest.raises(BadUsage, match=r"original layout.*\.pth.*never opened.*set teacher\.rest"):
        resolve(original, "auto")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "Wan2.1_VAE.pth").write_bytes(b"a pickle")
    with pytest.raises(BadUsage, match=r"pickled weights.*never opened.*-Diffusers"):
        resolve(tmp_path / "pickled", "auto", rest)
    for file in original.rglob("*.safetensors"):
        file.rename(file.with_suffix(".pth"))
    with pytest.raises(BadUsage, match="never opened"):
        resolve(original, "auto", rest)


def test_a_name_that_is_not_wans_is_refused(original: Path, rest: Path) -> None:
    path = original / "high_noise_model" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["blocks.0.self_attn.strange.weight"] = weights.pop("blocks.0.self_attn.q.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"missing: blocks\.0\.attn1\.to_q.*unknown: blocks\.0\.self_attn\.strange"):
        load_model(resolve(original, "auto", rest).components["transformer"], torch.float32)


def test_another_kind_of_model_is_refused(whole: Path, rest: Path, tmp_path: Path) -> None:
    write_original(whole / "transformer", tmp_path / "i2v", model_type="i2v")
    with pytest.raises(BadUsage, match=r"no text-to-video expert.*i2v"):
        resolve(tmp_path / "i2v", "auto", rest)


def test_it_is_prepared_under_diffusers_names(original: Path, rest: Path, tmp_path: Path) -> None:
    from common.log import Log

    out = prepare(resolve(original, "auto", rest), tmp_path / "out", torch.bfloat16, Log("test", quiet=True))
    assert "blocks.0.attn1.to_q.weight" in load_file(out / "transformer" / "model.safetensors")
