"""A student of its teacher's size is its teacher, at one frame; what may differ is switched and bounded here."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import BadUsage, Corrupt, Fault
from common.files import Content
from common.seals import damage_of, replace
from common.seals import sealed as sealed_in
from tests.micro import TRANSFORMER, built, write_micro_ti2v, write_micro_wan
from train.student import network, projection
from train.student.fresh import start_fresh
from train.student.layers import attended, normalised
from train.student.network import StudentConfig, WanLite, load_student, read_student_json, save_student
from train.student.projection import project


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def student_of(teacher: torch.nn.Module, **switches: Any) -> WanLite:
    """Same size, time squeezed out of the one kernel that has it."""
    student = WanLite(StudentConfig.from_wan_config(dict(teacher.config)), **switches).eval()
    weights = teacher.state_dict()
    weights["patch_embedding.weight"] = weights["patch_embedding.weight"].squeeze(2)
    student.load_state_dict(weights, strict=True)
    return student


def scene(batch: int, height: int, width: int, channels: int = 16, text_dim: int = 32) -> dict[str, Tensor]:
    """Noise, timesteps and texts of several lengths: trimmed, and zero-padded to 512."""
    generator = torch.Generator().manual_seed(batch * 10007 + height * 101 + width)
    lengths = torch.randint(1, 60, (batch,), generator=generator)
    text = torch.randn(batch, int(lengths.max()), text_dim, generator=generator)
    text *= (torch.arange(text.shape[1]) < lengths[:, None])[..., None]
    return {
        "latents": torch.randn(batch, channels, height, width, generator=generator),
        "timesteps": torch.rand(batch, generator=generator) * 1000,
        "text": text,
        "lengths": lengths,
        "padded": torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1])),
    }


@torch.no_grad()
def teachers(teacher: torch.nn.Module, at: Mapping[str, Tensor], timesteps: Tensor | None = None) -> Tensor:
    timesteps = at["timesteps"] if timesteps is None else timesteps
    return teacher(at["latents"][:, :, None], timesteps, at["padded"], return_dict=False)[0][:, :, 0]


@torch.no_grad()
def students(student: WanLite, at: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    return student(at["latents"].to(dtype), at["timesteps"], at["text"].to(dtype), at["lengths"])


SIZES = [(2, 8, 8), (2, 16, 24), (3, 32, 32), (4, 2, 30)]
OTHER_SIZES = [(1, 8, 8), (1, 32, 32), (2, 48, 40)]


@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_same_size_student_is_its_teacher(expert: str, tmp_path: Path) -> None:
    folder = write_micro_wan(tmp_path / "wan")
    teacher = WanTransformer3DModel.from_pretrained(folder / expert)
    student = student_of(teacher, collapse_padding=False)
    for size in SIZES:
        at = scene(*size)
        assert torch.equal(students(student, at), teachers(teacher, at)), size
        with torch.no_grad():
            padded = student(at["latents"], at["timesteps"], at["padded"])
        assert torch.equal(padded, teachers(teacher, at)), size
    for size in OTHER_SIZES:
        at = scene(*size)
        truth = teachers(teacher, at)
        assert (students(student, at) - truth).abs().max() <= 1e-5 * truth.std(), size


def test_integer_timesteps_count_as_the_teacher_counts_them() -> None:
    teacher = built(lambda: WanTransformer3DModel(**TRANSFORMER), "int")
    at = scene(2, 8, 8) | {"timesteps": torch.tensor([982, 3])}
    assert torch.equal(students(student_of(teacher, collapse_padding=False), at), teachers(teacher, at))


def random_architecture(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    channels = draw.choice([4, 16, 16, 48])
    return TRANSFORMER | {
        "num_layers": draw.randint(1, 4),
        "num_attention_heads": draw.randint(1, 6),
        "attention_head_dim": draw.choice([6, 8, 10, 12, 14, 16, 20, 32, 64, 128]),
        "in_channels": channels,
        "out_channels": draw.choice([channels, None]),
        "ffn_dim": draw.choice([17, 64, 200]),
        "freq_dim": draw.choice([16, 64, 256]),
        "cross_attn_norm": draw.random() < 0.8,
        "eps": draw.choice([1e-6, 1e-5]),
        "patch_size": draw.choice([(1, 2, 2), (1, 2, 2), (1, 1, 1), (1, 4, 4)]),
    }


@pytest.mark.parametrize("seed", range(12))
def test_any_architecture_is_its_teacher(seed: int) -> None:
    config = random_architecture(seed)
    teacher = built(lambda: WanTransformer3DModel(**config), f"any{seed}")
    at = scene(2, 4 * (1 + seed % 4), 8, channels=config["in_channels"])
    truth = teachers(teacher, at)
    difference = (students(student_of(teacher, collapse_padding=False), at) - truth).abs().max()
    assert difference == 0 if config["in_channels"] == 16 else difference <= 1e-5 * truth.std()
    collapsed = students(student_of(teacher), at)
    assert (collapsed - truth).norm() <= 1e-5 * truth.norm()


def test_per_token_timesteps_of_one_frame_are_the_scalar_path(tmp_path: Path) -> None:
    teacher = WanTransformer3DModel.from_pretrained(write_micro_ti2v(tmp_path / "ti2v") / "transformer")
    at = scene(2, 8, 8, channels=48)
    truth = teachers(teacher, at, timesteps=at["timesteps"][:, None].expand(2, 16))
    difference = (students(student_of(teacher, collapse_padding=False), at) - truth).abs().max()
    assert difference <= 1e-5 * truth.std()


@pytest.mark.parametrize("size", SIZES + OTHER_SIZES)
def test_collapsed_padding_weighs_what_the_padding_weighs(size: tuple[int, int, int]) -> None:
    teacher = built(lambda: WanTransformer3DModel(**TRANSFORMER), "collapse")
    at = scene(*size)
    truth = teachers(teacher, at)
    assert (students(student_of(teacher), at) - truth).norm() <= 1e-5 * truth.norm()


def test_collapse_of_a_full_a_nearly_full_and_an_empty_text() -> None:
    teacher = built(lambda: WanTransformer3DModel(**TRANSFORMER), "edges")
    at = scene(3, 8, 8) | {"lengths": torch.tensor([512, 511, 0])}
    text = torch.randn(3, 512, 32, generator=torch.Generator().manual_seed(5))
    padded = text * (torch.arange(512) < at["lengths"][:, None])[..., None]
    truth = teachers(teacher, at | {"padded": padded})
    assert (students(student_of(teacher), at | {"text": text}) - truth).norm() <= 1e-5 * truth.norm()


def test_collapse_loses_nothing_to_bfloat16() -> None:
    """One key with bias log(count) would: bfloat16 rounds that log by up to 1.5 % of the padding's weight."""
    teacher = built(lambda: WanTransformer3DModel(**TRANSFORMER), "half")
    at = scene(2, 16, 16)
    truth = teachers(teacher, at)
    plain, collapsed = (
        students(student_of(teacher, collapse_padding=on).bfloat16(), at, torch.bfloat16) for on in (False, True)
    )
    assert (collapsed - truth).norm() <= 1.1 * (plain - truth).norm()


def test_rows_beyond_a_text_are_never_read() -> None:
    teacher = built(lambda: WanTransformer3DModel(**TRANSFORMER), "rows")
    at = scene(2, 8, 8) | {"lengths": torch.tensor([3, 5])}
    for collapse in (True, False):
        student = student_of(teacher, collapse_padding=collapse)
        dirty = at | {"text": at["text"].clone()}
        dirty["text"][0, 3:], dirty["text"][1, 5:] = 7.0, 9.0
        clean = at | {"text": at["text"] * (torch.arange(at["text"].shape[1]) < at["lengths"][:, None])[..., None]}
        assert torch.equal(students(student, dirty), students(student, clean))


@pytest.mark.parametrize("collapse", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(collapse: bool) -> None:
    student = student_of(built(lambda: WanTransformer3DModel(**TRANSFORMER), "grad"), collapse_padding=collapse)
    at = scene(2, 8, 8)
    gradients = []
    for student.gradient_checkpointing in (False, True):
        student.zero_grad()
        student(at["latents"], at["timesteps"], at["text"], at["lengths"]).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in student.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


def test_autocast_to_bfloat16_trains_finite() -> None:
    student = student_of(built(lambda: WanTransformer3DModel(**TRANSFORMER), "auto"))
    at = scene(2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = student(at["latents"], at["timesteps"], at["text"], at["lengths"])
        # Kernels of bfloat16 attention are slow to go back through on a CPU, fused norms want one dtype.
        assert attended(*[out.bfloat16().flatten(2)[:, None]] * 3, None).dtype == torch.float32
        assert (
            normalised(student.blocks[0].attn1.norm_q, torch.ones(1, student.config.width).bfloat16()).dtype
            == torch.float32
        )
    assert attended(*[out.bfloat16().flatten(2)[:, None]] * 3, None).dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in student.parameters())
    assert (out.float() - students(student, at)).norm() < 0.05 * students(student, at).norm()


def test_saved_student_opens_as_it_was(tmp_path: Path) -> None:
    student = student_of(built(lambda: WanTransformer3DModel(**TRANSFORMER), "save"))
    save_student(tmp_path / "init", student.config, student.state_dict(), note="a test")
    opened, at = load_student(tmp_path / "init"), scene(2, 8, 8)
    assert opened.config == student.config and torch.equal(students(opened, at), students(student, at))


def damage(folder: Path, kind: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    if kind in ("nan", "inf", "-inf"):
        tensors = load_file(weights)
        tensors["proj_out.bias"][3] = float(kind)
        save_file(tensors, weights)
    elif kind == "torn":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "misfit":
        config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    elif kind == "garbled":
        config.write_bytes(config.read_bytes()[:-9] + b"\xff")
    elif kind == "no object":
        config.write_text("[1, 2]")
    else:
        (folder / kind).unlink()


@pytest.mark.parametrize(("kind", "fault", "named"), [
    ("nan", Corrupt, r"model\.safetensors .*proj_out\.bias"),
    ("inf", Corrupt, r"model\.safetensors .*proj_out\.bias"),
    ("-inf", Corrupt, r"model\.safetensors .*proj_out\.bias"),
    ("torn", Corrupt, r"model\.safetensors"),
    ("empty", Corrupt, r"model\.safetensors"),
    ("misfit", Corrupt, r"model\.safetensors does not fit the config\.json.*blocks\.2"),
    ("garbled", Corrupt, r"config\.json cannot be read"),
    ("no object", Corrupt, r"config\.json cannot be read"),
    ("config.json", BadUsage, r"there is no .*config\.json"),
    ("model.safetensors", Corrupt, r"model\.safetensors"),
])  # fmt: skip
def test_an_older_init_without_seals_is_damaged_in_one_line(
    kind: str, fault: type[Fault], named: str, micro_init: Path, tmp_path: Path
) -> None:
    shutil.copytree(micro_init, tmp_path / "init", ignore=shutil.ignore_patterns("seals"))
    load_student(tmp_path / "init")
    damage(tmp_path / "init", kind)
    with pytest.raises(fault, match=named) as raised:
        load_student(tmp_path / "init")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("make", ["project", "fresh", "save"])
def test_a_new_student_over_an_old_one_is_killed_and_neither_opens(
    make: str, sealed: bool, micro_wan: Path, micro_init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config.json is the new one already."""
    old = shutil.copytree(micro_init, tmp_path / "init")
    if not sealed:
        shutil.rmtree(old / "seals")
    new = dataclasses.replace(load_student(old).config, rope_max_seq_len=77)
    makers: dict[str, Callable[[], object]] = {
        "project": lambda: project(micro_wan, new, old, experts="high"),
        "fresh": lambda: start_fresh(new, old),
        "save": lambda: save_student(old, new, load_student(micro_init).state_dict()),
    }

    def killed(folder: Path, name: str, content: Content) -> None:
        if name == "model.safetensors":
            raise KeyboardInterrupt
        replace(folder, name, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for module in (network, projection):
            patch.setattr(module, "replace", killed)
        makers[make]()
    assert json.loads((old / "config.json").read_text())["rope_max_seq_len"] == 77
    assert "model.safetensors" not in sealed_in(old)
    with pytest.raises(Corrupt, match=r"model\.safetensors"):
        load_student(old)
    makers[make]()
    assert load_student(old).config == new and damage_of(old, "report.json") is None


def test_names_and_shapes_are_diffusers_own(tmp_path: Path) -> None:
    config = StudentConfig.from_wan_config(TRANSFORMER)
    stock = WanTransformer3DModel.from_config(config.to_wan_config()).state_dict()
    ours = WanLite(config).state_dict()
    assert {name: tuple(value.shape) for name, value in stock.items() if name != "patch_embedding.weight"} == {
        name: tuple(value.shape) for name, value in ours.items() if name != "patch_embedding.weight"
    }
    assert stock["patch_embedding.weight"].shape[2] == 1 and ours.keys() == stock.keys()


def test_student_imports_no_library_of_the_teachers() -> None:
    code = "import sys, train.student.network, train.vae.network, train.student.projection; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"diffusers", "transformers", "accelerate"} & set(loaded)


SMALL = """{
  // the file as its users know it, see https://example.org/wan
  "model_type": "WanLiteStudent", "hidden_size": 256, "depth": 4, "num_heads": 4,
  "num_channels": 16, "image_size": 256, // pixels
  "patch_size": 16, "text_max_length": 77, "text_encoder_output_dim": 4096, "projection_factor": 1.0
}"""


def test_users_json_is_read_with_comments(tmp_path: Path) -> None:
    path = tmp_path / "student.json"
    path.write_text(SMALL)
    config = read_student_json(path)
    assert (config.width, config.num_layers, config.head_dim, config.patch, config.ffn_dim) == (256, 4, 64, 2, 1024)
    assert (config.text_max_length, config.text_length, config.text_dim) == (77, 512, 4096)
    assert StudentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"depth"', '"dept"', "depth"),
        ('"depth": 4,', "", "depth"),
        ('"num_heads": 4', '"num_heads": 5', "260"),
        ('"patch_size": 16', '"patch_size": 12', "16"),
        ('"image_size": 256', '"image_size": 250', "256"),
        ('"depth": 4', '"depth": 4, "depth": 5', "twice"),
        ('"depth": 4', '"depth": "four"', "depth"),
        ('"depth": 4,', '"depth": 4', "line 3"),
    ],
)
def test_a_users_slip_is_named_with_what_would_do(old: str, new: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "student.json"
    path.write_text(SMALL.replace(old, new))
    with pytest.raises(BadUsage, match=said):
        read_student_json(path)


def test_an_image_to_video_teacher_is_refused() -> None:
    with pytest.raises(BadUsage, match="image"):
        StudentConfig.from_wan_config(TRANSFORMER | {"image_dim": 1280})


@pytest.mark.parametrize("path", sorted(Path("configs/students").glob("*.json")), ids=str)
def test_presets_are_students(path: Path) -> None:
    """And those whose name says how large they are, are."""
    config = read_student_json(path)
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in WanLite(config).parameters())
    said = path.stem.removesuffix("b").rpartition("_")[2]
    if path.stem.endswith("b") and said.replace(".", "").isdigit():
        assert abs(num_parameters / 1e9 - float(said)) < 0.06, f"{num_parameters / 1e9:.2f} billion"
