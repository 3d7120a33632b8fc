"""What is exported opens elsewhere, and draws what `train sample` draws."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from common.config import check
from common.errors import BadUsage, Corrupt
from common.schedule import seeded_noise
from common.shards import ShardSet
from common.wan_names import diffusers_name, original_name
from tests.made import command, harvest_config, harvest_here
from tests.train.test_opened import resealed, tell
from train.chosen import first_records
from train.config import TrainConfig
from train.dist import joined
from train.export import export
from train.loop import train
from train.pipeline import _plainly
from train.sample import draw, open_run, padded


def trained(folder: Path, set_path: Path, init: Path, **changes: Any) -> Path:
    values = {"set": str(set_path), "init": str(init), "out": str(folder / "run"), "batch_size": 8, "num_epochs": 0.2,
              "checkpoint_every": 100, "threads": 1, "device": "cpu"}  # fmt: skip
    config = check(TrainConfig, values | changes, source="test")
    with joined("cpu", timeout_s=60) as world:
        train(config, world)
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, micro_set: Path, micro_init: Path) -> Path:
    return trained(tmp_path_factory.mktemp("run"), micro_set, micro_init)


def drawn_by_sample(run_dir: Path, num: int) -> tuple[torch.Tensor, Any]:
    found = open_run(run_dir)
    found.student.collapse_padding = False
    records = first_records(found.shards, num)
    return draw(found.student, records, found.objective.grid(None), torch.device("cpu")), records


def drawn_by_stock(pipeline: Any, records: Any, steps: int) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    text, lengths = padded([record.text for record in records])
    assert int(lengths.max()) == text.shape[1]
    text = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
    noise = np.stack([seeded_noise(record.seed, record.final.shape) for record in records])
    out: torch.Tensor = pipeline(
        prompt_embeds=text, latents=torch.from_numpy(noise).unsqueeze(2), height=64, width=64, num_frames=1,
        num_inference_steps=steps, guidance_scale=1.0, output_type="latent",
    ).frames  # fmt: skip
    return out.squeeze(2)


def test_a_stock_pipeline_draws_what_train_sample_draws(tmp_path: Path, run: Path, micro_wan: Path) -> None:
    from diffusers import WanPipeline

    done = command("train", "export", run, "--out", tmp_path / "student", "--text-encoder", micro_wan)
    assert done.returncode == 0, done.stderr
    pipeline = WanPipeline.from_pretrained(tmp_path / "student", torch_dtype=torch.float32)
    mine, records = drawn_by_sample(run, 4)
    steps = open_run(run).shards.contract.steps
    np.testing.assert_array_equal(drawn_by_stock(pipeline, records, steps).numpy(), mine.numpy())
    picture = pipeline("a red cat", num_frames=1, height=64, width=64, num_inference_steps=2, guidance_scale=1.0)
    assert np.isfinite(picture.frames).all()


def test_the_text_encoder_is_linked_or_copied_or_absent(tmp_path: Path, run: Path, micro_wan: Path) -> None:
    export(run, tmp_path / "linked", form="diffusers", text_encoder=micro_wan)
    export(run, tmp_path / "copied", form="diffusers", text_encoder=micro_wan, copy=True)
    export(run, tmp_path / "bare", form="diffusers")
    weights = "text_encoder/model.safetensors"
    assert (tmp_path / "linked" / weights).resolve() == (micro_wan / weights).resolve()
    assert not (tmp_path / "copied" / weights).is_symlink()
    for name in (weights, "tokenizer/tokenizer.json"):
        assert (tmp_path / "copied" / name).read_bytes() == (micro_wan / name).read_bytes()
    from diffusers import WanPipeline

    assert WanPipeline.from_pretrained(tmp_path / "bare", text_encoder=None, tokenizer=None).text_encoder is None
    assert "text_encoder=..." in (tmp_path / "bare/README.md").read_text()


@pytest.mark.parametrize("copy", [True, False])
def test_a_text_encoder_under_a_variants_name_opens_under_its_plain_one(
    tmp_path: Path, run: Path, micro_wan: Path, copy: bool
) -> None:
    """diffusers opens all parts of a folder with one variant, and the student has none."""
    from diffusers import WanPipeline
    from transformers import UMT5EncoderModel

    shutil.copytree(micro_wan, tmp_path / "fp16")
    encoder = tmp_path / "fp16/text_encoder"
    plain = UMT5EncoderModel.from_pretrained(encoder, dtype=torch.float16)
    shutil.rmtree(encoder)
    plain.save_pretrained(encoder, variant="fp16", max_shard_size="20KB")
    assert len(list(encoder.glob("*.fp16*.safetensors"))) + len(list(encoder.glob("*.index.fp16.json"))) > 2
    export(run, tmp_path / "student", form="diffusers", text_encoder=tmp_path / "fp16", copy=copy)
    opened = WanPipeline.from_pretrained(tmp_path / "student", torch_dtype=torch.float32)
    theirs = plain.state_dict()
    assert all(torch.equal(tensor, theirs[name].float()) for name, tensor in opened.text_encoder.state_dict().items())


@pytest.mark.parametrize("missing", ["text_encoder", "tokenizer", "text_encoder/model.safetensors",
                                     "tokenizer/tokenizer_config.json", "model_index.json"])  # fmt: skip
@pytest.mark.parametrize("copy", [True, False])
def test_a_text_encoder_that_is_not_whole_is_refused_before_a_byte_is_written(
    missing: str, copy: bool, tmp_path: Path, run: Path, micro_wan: Path
) -> None:
    folder = tmp_path / "half"
    shutil.copytree(micro_wan, folder, ignore=shutil.ignore_patterns("transformer*", "vae"))
    gone = folder / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(BadUsage) as fault:
        export(run, tmp_path / "student", form="diffusers", text_encoder=folder, copy=copy)
    assert "--text-encoder" in fault.value.wrong and Path(missing).parts[0].removesuffix(".json") in fault.value.found
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_what_a_form_has_no_place_for_is_refused(tmp_path: Path, run: Path, micro_wan: Path) -> None:
    for form in ("wanlite", "comfyui"):
        with pytest.raises(BadUsage, match="holds no text encoder"):
            export(run, tmp_path / "no", form=form, text_encoder=micro_wan)  # type: ignore[arg-type]
    export(run, tmp_path / "plain", form="wanlite")
    told = (tmp_path / "plain/README.md").read_text()
    assert "load_student" in told and "WanPipeline" not in told, "a card tells how its own folder is opened"


def test_a_few_step_student_walks_as_its_card_says(tmp_path: Path, micro_wan: Path, micro_init: Path) -> None:
    """The code of the card itself is run."""
    config = harvest_config(tmp_path / "set", micro_wan, steps=8, keep=4, keep_at=(0, 2, 4, 6))
    run_dir = trained(tmp_path, harvest_here(config), micro_init, objective="segment")
    export(run_dir, tmp_path / "student", form="diffusers", text_encoder=micro_wan)
    code = (tmp_path / "student/README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('"this folder"', repr(str(tmp_path / "student"))).rpartition("pipe(")[0]
    scope: dict[str, Any] = {}
    exec(code, scope)
    mine, records = drawn_by_sample(run_dir, 4)
    stock = drawn_by_stock(scope["pipe"], records, 4)
    np.testing.assert_allclose(stock.numpy(), mine.numpy(), atol=2e-5)


@pytest.mark.parametrize(("most", "padded_to"), [(2, 512), (3, 77), (512, 2048)])
def test_a_student_of_fewer_text_rows_draws_as_its_card_says(
    tmp_path: Path, run: Path, micro_wan: Path, most: int, padded_to: int
) -> None:
    """The code of the card itself is run. The prompts have four rows."""
    from click.testing import CliRunner

    from train.commands import export as command

    shutil.copytree(run, tmp_path / "run")
    told = {"text_max_length": most, "text_length": padded_to}
    resealed(tmp_path / "run", lambda summary: summary["student"].update(told))
    words = [tmp_path / "run", "--out", tmp_path / "student", "--text-encoder", micro_wan]
    done = CliRunner().invoke(command, [str(word) for word in words])
    assert done.exit_code == 0 and f"first {most} text rows of a prompt, padded to {padded_to}" in done.output
    found = open_run(tmp_path / "run")
    records = first_records(found.shards, 2)
    mine = draw(found.student, records[:1], found.objective.grid(None), torch.device("cpu"), text_rows=most)
    noise = torch.from_numpy(seeded_noise(records[0].seed, records[0].final.shape))[None, :, None]
    code = (tmp_path / "student/README.md").read_text().split("```python\n")[1].split("```")[0]
    inputs = "height=64, width=64, latents=noise, output_type='latent'"
    for here, there in (
        ('"this folder"', repr(str(tmp_path / "student"))),
        ('"..."', repr(records[0].prompt)),
        ("pipe(prompt", "out = pipe(prompt"),
        ("height=..., width=...", inputs),
    ):
        assert here in code
        code = code.replace(here, there)
    scope: dict[str, Any] = {"noise": noise}
    exec(code, scope)
    naive = drawn_by_stock(scope["pipe"], records[:1], found.shards.contract.steps)
    off, naively_off = ((drawn - mine).norm() / mine.norm() for drawn in (scope["out"].frames.squeeze(2), naive))
    assert off < 2e-3 < 2e-2 < naively_off


def test_strip_export_strip_is_bitwise(tmp_path: Path, run: Path) -> None:
    from train.student.projection import strip

    export(run, tmp_path / "student", form="diffusers")
    raw = load_file(tmp_path / "student/transformer/diffusion_pytorch_model.safetensors")
    assert raw["patch_embedding.weight"].ndim == 5
    again = {name: strip(name, tensor) for name, tensor in raw.items()}
    kept = load_file(max((run / "checkpoints").glob("[0-9]*")) / "ema.safetensors")
    assert again.keys() == kept.keys() and all(torch.equal(again[name], kept[name]) for name in kept)


def test_comfyui_names_are_the_original_layouts(tmp_path: Path, run: Path, micro_set: Path) -> None:
    """diffusers' own conversion turns the file back into the student."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    with pytest.raises(BadUsage, match="128 channels a head"):
        export(run, tmp_path / "refused.safetensors", form="comfyui")
    wide = wide_checkpoint(tmp_path, micro_set)
    export(wide, tmp_path / "comfy.safetensors", form="comfyui")
    named = load_file(tmp_path / "comfy.safetensors")
    assert named["patch_embedding.weight"].shape == (256, 16, 1, 2, 2) and "head.modulation" in named
    assert "blocks.0.self_attn.norm_q.weight" in named and "blocks.1.cross_attn.o.bias" in named
    back = convert_wan_transformer_to_diffusers(dict(named))
    kept = load_file(max((wide / "checkpoints").glob("[0-9]*")) / "ema.safetensors")
    assert back.keys() == kept.keys() and all(
        torch.equal(back[name].reshape(kept[name].shape), kept[name]) for name in kept
    )
    assert all(diffusers_name(original_name(name)) == name for name in kept)


def wide_checkpoint(folder: Path, set_path: Path) -> Path:
    """A run of a student with heads as ComfyUI wants them, from random weights."""
    from train.student.network import StudentConfig, WanLite, save_student

    text_dim = ShardSet.open(set_path).contract.text_dim
    config = StudentConfig(num_layers=2, num_heads=2, head_dim=128, in_channels=16, out_channels=16, patch=2,
                           text_dim=text_dim, ffn_dim=64)  # fmt: skip
    save_student(folder / "wide", config, WanLite(config).state_dict())
    return trained(folder, set_path, folder / "wide")


def test_every_form_says_where_it_comes_from(tmp_path: Path, run: Path, micro_set: Path) -> None:
    export(run, tmp_path / "student", form="diffusers", license_name="apache-2.0")
    export(run, tmp_path / "plain", form="wanlite", averaged=False)
    contract = ShardSet.open(micro_set).contract
    for file in ("student/transformer/diffusion_pytorch_model.safetensors", "plain/model.safetensors"):
        with safe_open(tmp_path / file, "pt") as stored:
            told = stored.metadata()
        assert told["contract"] == contract.digest() and told["teacher_weights"] == contract.weights
        assert told["made_by"].startswith("wan-lite") and int(told["samples_seen"]) > 0
    assert "license: apache-2.0" in (tmp_path / "student/README.md").read_text()
    from train.student.network import load_student

    weights = load_student(tmp_path / "plain").state_dict()
    raw = load_file(max((run / "checkpoints").glob("[0-9]*")) / "model.safetensors")
    assert all(torch.equal(weights[name], raw[name]) for name in raw)


def test_a_damaged_checkpoint_or_a_taken_name_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(BadUsage, match="exists"):
        export(run, tmp_path, form="wanlite")
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(yaml.safe_load((run / "config.yaml").read_text())))
    file = max((tmp_path / "run/checkpoints").glob("[0-9]*")) / "ema.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(Corrupt, match="damaged"):
        export(tmp_path / "run", tmp_path / "out", form="wanlite")
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadUsage, match="no checkpoint"):
        export(tmp_path / "nothing", tmp_path / "out", form="wanlite")
    assert json.loads((file.parent / "state.json").read_text())["samples_seen"] > 0


def test_a_file_system_without_links_is_said_and_nothing_is_left(
    tmp_path: Path, run: Path, micro_wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(BadUsage, match="--copy"):
        export(run, tmp_path / "out", form="diffusers", text_encoder=micro_wan)
    assert not list(tmp_path.iterdir())
    export(run, tmp_path / "out", form="diffusers", text_encoder=micro_wan, copy=True)


def test_an_export_reads_what_it_exports(tmp_path: Path, run: Path) -> None:
    """A checkpoint's optimizer is twice its weights."""
    shutil.copytree(run, tmp_path / "run")
    newest = max((tmp_path / "run/checkpoints").glob("[0-9]*"))
    (newest / "optimizer.safetensors").unlink()
    export(tmp_path / "run", tmp_path / "out", form="wanlite")
    assert (tmp_path / "out/model.safetensors").exists()
    assert command("train", "verify", newest).returncode == 5


def test_of_two_variants_one_is_taken_whole(tmp_path: Path) -> None:
    """A plain file beside the other variant's shards, as a folder may hold that was fetched twice."""
    for name in ("model-00001-of-00002", "model-00002-of-00002", "model.fp16"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    (tmp_path / "config.json").write_text("{}")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    plain = ["config.json", *sorted(shards.values()), "model.safetensors.index.json"]
    assert sorted(name for name, _ in _plainly(tmp_path)) == sorted(plain)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert [(name, path.name) for name, path in _plainly(tmp_path)] == [
        ("config.json", "config.json"), ("model.safetensors", "model.fp16.safetensors")]  # fmt: skip


def test_a_damaged_autoencoder_is_never_exported(tmp_path: Path, run: Path, micro_set: Path) -> None:
    """Of a sealed set, and of an older one whose parts are not there."""
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(micro_set, tmp_path / "set")
    tell(tmp_path / "run", set=str(tmp_path / "set"))
    vae = tmp_path / "set/assets/vae"
    weights, values = next(vae.glob("*.safetensors")), vae / "config.json"
    data = weights.read_bytes()
    weights.write_bytes(data[:-500] + bytes([data[-500] ^ 64]) + data[-499:])

    def exported() -> None:
        export(tmp_path / "run", tmp_path / "out", form="diffusers")

    with pytest.raises(Corrupt, match=weights.name):
        exported()
    shutil.rmtree(tmp_path / "set/assets/seals")
    weights.write_bytes(data[:-500])
    with pytest.raises(Corrupt, match=weights.name):
        exported()
    weights.unlink()
    with pytest.raises(BadUsage, match="no weights"):
        exported()
    values.write_text(values.read_text()[:-9])
    with pytest.raises(Corrupt, match=r"vae/config\.json cannot be read"):
        exported()
    values.unlink()
    with pytest.raises(BadUsage, match=r"there is no .*vae/config\.json"):
        exported()
    assert not (tmp_path / "out").exists()


def test_the_next_runs_init_is_sealed_as_any_other(tmp_path: Path, run: Path) -> None:
    from common.seals import sealed
    from train.student.network import CONFIG_NAME, WEIGHTS_NAME, load_student

    export(run, tmp_path / "init", form="wanlite")
    assert sealed(tmp_path / "init") == [CONFIG_NAME, WEIGHTS_NAME]
    load_student(tmp_path / "init")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        data = (tmp_path / "init" / name).read_bytes()
        (tmp_path / "init" / name).write_bytes(data[:-30] + bytes([data[-30] ^ 1]) + data[-29:])
        with pytest.raises(Corrupt, match=name):
            load_student(tmp_path / "init")
        (tmp_path / "init" / name).write_bytes(data)
