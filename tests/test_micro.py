"""The micro teachers are what they claim: stock pipelines open them, and their outputs hang on text and timestep."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, WanPipeline
from safetensors import safe_open
from transformers import AutoTokenizer

from tests.micro import write_micro_ti2v, write_micro_wan
from tests.micro_sd import write_micro_sd

WRITERS: dict[str, Callable[..., Path]] = {
    "wan22": lambda folder, **kw: write_micro_wan(folder, **kw),
    "wan21": lambda folder, **kw: write_micro_wan(folder, experts=1, **kw),
    "ti2v": write_micro_ti2v,
    "sd-v": write_micro_sd,
    "sd-eps": lambda folder, **kw: write_micro_sd(folder, prediction_type="epsilon", scheduler="PNDMScheduler", **kw),
}


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("kind", list(WRITERS))
def test_stock_pipeline_opens_it_and_draws(kind: str, variant: str | None, tmp_path: Path) -> None:
    started = time.monotonic()
    folder = WRITERS[kind](tmp_path / kind, variant=variant)
    if variant is None:  # the imports above are paid; what is left is the writing
        assert time.monotonic() - started < 2.0
    wan = not kind.startswith("sd")
    pipeline = (WanPipeline if wan else StableDiffusionPipeline).from_pretrained(
        folder, variant=variant, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    options |= {"num_frames": 1} if wan else {}
    latents = pipeline("a red circle", output_type="latent", **options)[0]
    picture = pipeline("a red circle", output_type="pt", **options)[0]
    channels, side = {"ti2v": (48, 4), "sd-v": (4, 8), "sd-eps": (4, 8)}.get(kind, (16, 8))
    assert latents.shape[1] == channels and latents.shape[-2:] == (side, side)
    assert torch.isfinite(latents).all() and 0.3 < latents.std() < 5
    assert picture.shape[-2:] == (64, 64) and torch.isfinite(picture).all() and picture.std() > 0.05


def test_experts_differ_and_hang_on_text_and_timestep(tmp_path: Path) -> None:
    pipeline = WanPipeline.from_pretrained(write_micro_wan(tmp_path / "wan"))
    assert pipeline.config.boundary_ratio == 0.875 and not pipeline.config.expand_timesteps
    latents = torch.randn(2, 16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    text, _ = pipeline.encode_prompt(
        ["a red circle", "the sea"], do_classifier_free_guidance=False, max_sequence_length=512
    )

    def velocity(model: torch.nn.Module, timestep: float, text: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(latents, torch.full((2,), timestep), text, return_dict=False)[0]

    outputs = [velocity(model, 900.0, text) for model in (pipeline.transformer, pipeline.transformer_2)]
    assert all(0.3 < out.std() < 4 for out in outputs)
    assert (outputs[0] - outputs[1]).std() > 0.3
    assert (outputs[0] - velocity(pipeline.transformer, 500.0, text)).std() > 0.1
    assert (outputs[0] - velocity(pipeline.transformer, 900.0, text.flip(0))).std() > 0.1


def test_one_model_folders_say_so(tmp_path: Path) -> None:
    index = json.loads((write_micro_wan(tmp_path / "wan21", experts=1) / "model_index.json").read_text())
    assert index["transformer_2"] == [None, None] and index["boundary_ratio"] is None
    assert not (tmp_path / "wan21" / "transformer_2").exists()
    index = json.loads((write_micro_ti2v(tmp_path / "ti2v") / "model_index.json").read_text())
    assert index["expand_timesteps"] is True


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    one, two, other = (write_micro_wan(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (one / weights).read_bytes() == (two / weights).read_bytes() != (other / weights).read_bytes()


def test_writing_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    write_micro_wan(tmp_path / "wan")
    assert torch.equal(before, torch.get_rng_state())


def test_fp16_variant_holds_halves_and_nothing_else(tmp_path: Path) -> None:
    folder = write_micro_wan(tmp_path / "wan", variant="fp16")
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == 4 and all(file.name.endswith(".fp16.safetensors") for file in files)
    for file in files:
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_every_text_has_its_own_tokens(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_micro_wan(tmp_path / "wan") / "tokenizer")
    texts = ["a red circle", "A Red Circle", "漢字", "漢", "naïve \N{SNOWMAN}", ""]
    rows = [tuple(tokenizer(text).input_ids) for text in texts]
    assert len(set(rows)) == len(texts) and all(2 not in row and row[-1] == 1 for row in rows)
    assert tokenizer.decode(rows[4], skip_special_tokens=True) == texts[4]
