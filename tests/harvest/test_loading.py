"""Our load against the libraries' own, bit for bit; and every way in which a folder can be wrong, by name."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import BadUsage, Corrupt, Fault, Refused
from harvest.loading.folder import Resolved, resolve
from harvest.loading.identity import fingerprint, tensor_digests
from harvest.loading.weights import build, load_model
from tests.micro import write_micro_ti2v, write_micro_wan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FOLDERS: dict[str, dict[str, Any]] = {
    "single": {},
    "fp16": {"variant": "fp16"},
    "sharded": {"max_shard_size": "100KB"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {name: write_micro_wan(root / name, **options) for name, options in FOLDERS.items()}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(folders["single"], tmp_path / "wan")
    return tmp_path / "wan"


def stock(resolved: Resolved, name: str, dtype: torch.dtype) -> Any:
    import importlib

    part = resolved.components[name]
    model_class = getattr(importlib.import_module(part.library), part.class_name)
    word = "dtype" if part.library == "transformers" else "torch_dtype"
    return model_class.from_pretrained(str(part.folder), variant=part.variant, use_safetensors=True, **{word: dtype})


def identity(model: Any) -> str:
    return fingerprint([tensor_digests(model)])


def same_tensors(ours: Any, theirs: Any) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    for (name, buffer), (_, theirs_buffer) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert buffer.device.type == "cpu" and torch.equal(buffer, theirs_buffer), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("name", ["transformer", "transformer_2", "text_encoder", "vae"])
def test_loaded_weights_are_the_stock_ones_bitwise(
    folders: dict[str, Path], kind: str, name: str, dtype: torch.dtype
) -> None:
    resolved = resolve(folders[kind], "auto")
    assert resolved.components[name].variant == ("fp16" if kind == "fp16" else None)
    same_tensors(load_model(resolved.components[name], dtype), stock(resolved, name, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ti2v_form_loads_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    resolved = resolve(write_micro_ti2v(tmp_path / "ti2v"), "auto")
    for name in ("transformer", "vae"):
        same_tensors(load_model(resolved.components[name], dtype), stock(resolved, name, dtype))
    assert "transformer_2" not in resolved.components and resolved.scalars["expand_timesteps"] is True


def test_folders_that_load_to_the_same_tensors_have_one_fingerprint(folders: dict[str, Path]) -> None:
    def of(kind: str, dtype: torch.dtype) -> str:
        return identity(load_model(resolve(folders[kind], "auto").components["transformer"], dtype))

    assert of("single", torch.bfloat16) == of("sharded", torch.bfloat16) != of("single", torch.float32)
    other = load_model(resolve(folders["single"], "auto").components["transformer_2"], torch.bfloat16)
    assert identity(other) != of("single", torch.bfloat16)


def test_embeddings_are_tied(folders: dict[str, Path]) -> None:
    encoder = load_model(resolve(folders["single"], "auto").components["text_encoder"], torch.float32)
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight and encoder.shared.weight.any()


def test_progress_ends_at_all_bytes(folders: dict[str, Path]) -> None:
    part = resolve(folders["sharded"], "auto").components["transformer"]
    told: list[dict[str, Any]] = []
    load_model(part, torch.bfloat16, moved=lambda **facts: told.append(facts))
    assert told[-1]["bytes_read"] == told[-1]["bytes_total"] > 300_000 and told[-1]["loading"] == "transformer"
    assert {fact["file"] for fact in told[1:]} == {path.name for path in part.files} and len(part.files) > 2


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = next(folder.glob("*.safetensors"))
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def poison(weights: dict[str, torch.Tensor]) -> None:
    weights["proj_out.bias"][2] = float("nan")


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")


def drop_embeddings(weights: dict[str, torch.Tensor]) -> None:
    for name in EMBEDDINGS:
        weights.pop(name, None)


def clear_embeddings(weights: dict[str, torch.Tensor]) -> None:
    for name in weights.keys() & set(EMBEDDINGS):
        weights[name].zero_()


def weights_of(folder: Path) -> Path:
    return next((folder / "transformer").glob("*.safetensors"))


TRAPS: dict[str, tuple[Callable[[Path], Any], type[Fault], str]] = {
    "a missing tensor": (
        lambda f: edit_weights(f / "transformer", lambda w: w.pop("blocks.1.attn2.to_k.weight")),
        Refused, "1 missing: blocks.1.attn2.to_k.weight"),
    "a tensor too many": (
        lambda f: edit_weights(f / "transformer", lambda w: w.update({"blocks.9.norm": torch.ones(2)})),
        Refused, "1 unknown: blocks.9.norm"),
    "another shape": (lambda f: edit_json(f / "transformer" / "config.json", ffn_dim=64), Refused, "another shape"),
    "no embeddings": (lambda f: edit_weights(f / "text_encoder", drop_embeddings), Refused, "missing: shared.weight"),
    "embeddings of zeros": (
        lambda f: edit_weights(f / "text_encoder", clear_embeddings), Refused, "embeddings are empty"),
    "NaN": (lambda f: edit_weights(f / "transformer_2", poison), Corrupt, "holds NaN or Inf.*proj_out.bias"),
    "a torn file": (lambda f: cut(weights_of(f), 50_000), Corrupt, "cannot be read"),
    "a torn header": (lambda f: cut(weights_of(f), 100), Corrupt, "cannot be read"),
    "no weights": (lambda f: weights_of(f).unlink(), BadUsage, "no safetensors weights"),
    "only pickles": (lambda f: weights_of(f).rename(weights_of(f).with_suffix(".bin")), BadUsage, "never opened"),
    "a component too few": (lambda f: shutil.rmtree(f / "text_encoder"), BadUsage, "lacks 'text_encoder'"),
    "no index": (lambda f: (f / "model_index.json").unlink(), BadUsage, "there is no teacher"),
    "an index of nonsense": (lambda f: (f / "model_index.json").write_text("{"), BadUsage, "is not JSON"),
    "a foreign pipeline": (
        lambda f: edit_json(f / "model_index.json", _class_name="FluxPipeline"), Refused, "no teacher of this kind"),
    "the original layout": (
        lambda f: ((f / "model_index.json").unlink(), (f / "high_noise_model").mkdir()), BadUsage, "original layout"),
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_a_wrong_folder_is_named_and_never_loaded(folder: Path, trap: str, tmp_path: Path) -> None:
    from common.log import Log
    from common.watch import Watch
    from harvest.config import TeacherConfig
    from harvest.teachers import load_teacher

    change, fault, what = TRAPS[trap]
    change(folder)
    with pytest.raises(fault, match=what):
        config = TeacherConfig(folder=folder, dtype="float32", device="cpu")
        with Watch(tmp_path / "run", Log("test", quiet=True)) as watch:
            load_teacher(config, resolve(folder, "auto"), watch, Log("test", quiet=True))


def test_one_embedding_name_is_enough(folder: Path) -> None:
    """Official encoders store either `shared.weight` or `encoder.embed_tokens.weight`, or both."""
    whole = load_model(resolve(folder, "auto").components["text_encoder"], torch.float32)

    def rename(weights: dict[str, torch.Tensor]) -> None:
        table = weights.pop("shared.weight", None)
        weights["encoder.embed_tokens.weight"] = table if table is not None else weights["encoder.embed_tokens.weight"]

    edit_weights(folder / "text_encoder", rename)
    encoder = load_model(resolve(folder, "auto").components["text_encoder"], torch.float32)
    assert identity(encoder) == identity(whole)


def test_an_index_that_names_a_missing_shard(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sharded"], tmp_path / "wan")
    gone = sorted((tmp_path / "wan" / "transformer").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(BadUsage, match=gone.name):
        resolve(tmp_path / "wan", "auto")


def test_a_variant_that_only_some_components_have(folders: dict[str, Path], folder: Path) -> None:
    shutil.rmtree(folder / "transformer")
    shutil.copytree(folders["fp16"] / "transformer", folder / "transformer")
    parts = resolve(folder, "auto").components
    assert (parts["transformer"].variant, parts["transformer_2"].variant) == ("fp16", None)
    assert "transformer 178.0 kB (fp16 files), transformer_2 349.7 kB (plain" in resolve(folder, "auto").summary()
    with pytest.raises(BadUsage, match="no fp16 safetensors"):
        resolve(folder, "fp16")
    with pytest.raises(BadUsage, match="no safetensors weights"):
        resolve(folder, "none")


def test_scalars_and_absent_parts_are_facts(folder: Path) -> None:
    edit_json(folder / "model_index.json", image_encoder=[None, None], safety_checker=[None, None], force_zeros=True)
    resolved = resolve(folder, "auto")
    assert resolved.scalars["boundary_ratio"] == 0.875 and resolved.scalars["force_zeros"] is True
    assert "image_encoder" not in resolved.components and "safety_checker" not in resolved.components


def test_a_name_is_found_in_the_hubs_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--Somebody--Wan-Diffusers" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert resolve(Path("Somebody/Wan-Diffusers"), "auto").folder == snapshot
    with pytest.raises(BadUsage, match="hub's cache"):
        resolve(Path("Somebody/Else"), "auto")


def test_what_is_built_beside_a_load_leaves_its_weights_alone(tmp_path: Path, micro_wan: Path) -> None:
    """accelerate's context patches every module of the process: another part may be built while one is filled."""
    parts = resolve(micro_wan, "auto").components
    done = threading.Event()

    def build_on_and_on() -> None:
        while not done.is_set():
            build(parts["vae"])

    builder = threading.Thread(target=build_on_and_on)
    builder.start()
    try:
        for _ in range(30):
            loaded = load_model(parts["transformer"], torch.float32).state_dict()
            assert not any(tensor.is_meta for tensor in loaded.values())
    finally:
        done.set()
        builder.join()
