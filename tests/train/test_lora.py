"""Adapters: what is trained, kept, resumed, merged and handed out; and who needs peft for which of it."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.config import check
from common.errors import BadUsage, Refused, Stopped
from tests.made import command, trained_here
from train.config import Lora, TrainConfig
from train.dist import World
from train.export import export
from train.extras import require_extras
from train.lora import DOWN, UP, adapt, merged
from train.run_folder import EMA_NAME, MODEL_NAME, OPTIMIZER_NAME, checkpoints, read_metrics
from train.sample import open_run
from train.student.network import WEIGHTS_NAME, load_student

pytest.importorskip("peft")
ALONE = World(rank=0, size=1, device=torch.device("cpu"))
LORA = {"rank": 4, "alpha": 8, "targets": ["to_q", "to_v", "to_out.0", "net.2"]}


def settings(folder: Path, set_path: Path, init: Path) -> dict[str, Any]:
    return {"set": set_path, "init": init, "out": folder / "run", "batch_size": 4, "global_batch": 8, "num_epochs": 1,
            "warmup_steps": 1, "checkpoint_every": 2, "log_every": 1, "threads": 1, "device": "cpu", "lr": 1e-2,
            "lora": LORA}  # fmt: skip


@pytest.fixture
def asked(tmp_path: Path, micro_set: Path, micro_init: Path) -> dict[str, Any]:
    return settings(tmp_path, micro_set, micro_init)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, micro_set: Path, micro_init: Path) -> Path:
    """9 steps."""
    return trained_here(settings(tmp_path_factory.mktemp("straight"), micro_set, micro_init), save_samples=True)


def adapted(init: Path, weights: dict[str, torch.Tensor], lora: dict[str, Any] = LORA) -> Any:
    student = load_student(init)
    adapt(student, Lora(**lora), seed=0)
    own = dict(student.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    return student.eval()


def asked_of(student: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    latents, text = torch.randn(2, 16, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
    with torch.inference_mode():
        answer: torch.Tensor = student(latents, torch.tensor([900.0, 100.0]), text, torch.tensor([7, 4]))
    return answer


def test_adapters_alone_are_trained_averaged_and_kept(straight: Path, micro_init: Path) -> None:
    saved = {name: load_file(checkpoints(straight)[-1] / name) for name in (MODEL_NAME, EMA_NAME, OPTIMIZER_NAME)}
    fresh = adapted(micro_init, {})
    expected = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert len(expected) == 2 * (2 * 2 * 3 + 2), "two blocks: three layers of two attentions, one of the feed-forward"
    assert all(name.endswith((DOWN, UP)) for name in expected)
    assert saved[MODEL_NAME].keys() == saved[EMA_NAME].keys() == expected
    assert {key.rsplit(":", 1)[0] for key in saved[OPTIMIZER_NAME]} == expected
    assert all(tensor.abs().max() > 0 for name, tensor in saved[MODEL_NAME].items() if name.endswith(UP))
    size = sum((checkpoints(straight)[-1] / name).stat().st_size for name in saved)
    assert size < (micro_init / WEIGHTS_NAME).stat().st_size, "smaller than the student alone"
    losses = [line["loss"] for line in read_metrics(straight) if "loss" in line]
    assert losses[-1] < losses[0]


def test_stopped_after_any_step_it_goes_on_to_the_same_bits(asked: dict[str, Any], straight: Path) -> None:
    for _ in range(3):
        with pytest.raises(Stopped):
            trained_here(asked, limit_s=0.0)
    trained_here(asked)
    for name in (MODEL_NAME, EMA_NAME, OPTIMIZER_NAME):
        mine, theirs = (checkpoints(out)[-1] / name for out in (asked["out"], straight))
        assert mine.read_bytes() == theirs.read_bytes(), name


def test_at_first_nothing_is_changed_and_the_seed_alone_decides_what_comes(micro_init: Path) -> None:
    plain, student = load_student(micro_init).eval(), adapted(micro_init, {})
    assert torch.equal(asked_of(plain), asked_of(student))
    torch.manual_seed(99)
    again = dict(adapted(micro_init, {}).named_parameters())
    assert all(torch.equal(parameter, again[name]) for name, parameter in student.named_parameters())
    downs = [parameter.flatten()[:8] for name, parameter in student.named_parameters() if name.endswith(DOWN)]
    assert all(not torch.equal(one, downs[0]) for one in downs[1:])


@pytest.mark.parametrize("lora", [
    {"rank": 1, "alpha": 0.5, "targets": ["to_q"]},
    {"rank": 5, "alpha": 16, "targets": ["proj", "net.2", "proj_out"]},
    {"rank": 16, "alpha": 16, "targets": ["to_q", "to_k", "to_v", "to_out.0", "linear_1", "time_proj"]},
])  # fmt: skip
def test_merged_weights_answer_as_the_adapters_do(lora: dict[str, Any], micro_init: Path) -> None:
    student = adapted(micro_init, {}, lora)
    rng = torch.Generator().manual_seed(lora["rank"])
    drawn = {name: torch.randn(parameter.shape, generator=rng) * 0.05
             for name, parameter in student.named_parameters() if parameter.requires_grad}  # fmt: skip
    student = adapted(micro_init, drawn, lora)
    base = load_file(micro_init / WEIGHTS_NAME)
    plain = load_student(micro_init)
    plain.load_state_dict(merged(base, drawn, Lora(**lora)), strict=True)
    theirs, mine, before = asked_of(student), asked_of(plain.eval()), asked_of(load_student(micro_init).eval())
    assert (theirs - before).abs().max() > 1e-2, "the adapters say something"
    scale = theirs.abs().max()
    torch.testing.assert_close(mine / scale, theirs / scale, rtol=0, atol=1e-6)


def test_export_merges_or_writes_what_peft_opens(tmp_path: Path, straight: Path, micro_init: Path) -> None:
    from peft import PeftModel

    theirs = asked_of(adapted(micro_init, load_file(checkpoints(straight)[-1] / EMA_NAME)))
    export(straight, tmp_path / "plain", form="wanlite")
    torch.testing.assert_close(asked_of(load_student(tmp_path / "plain").eval()), theirs, rtol=0, atol=1e-5)
    done = command("train", "export", straight, "--adapter", "--out", tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    opened = PeftModel.from_pretrained(load_student(micro_init).eval(), str(tmp_path / "adapter"))
    assert torch.equal(asked_of(opened), theirs)
    digest = json.loads((checkpoints(straight)[-1] / "state.json").read_bytes())["base"]
    assert digest in (tmp_path / "adapter" / "README.md").read_text()


def test_what_is_not_a_runs_own_is_refused(tmp_path: Path, asked: dict[str, Any], micro_set: Path,
                                           micro_init: Path) -> None:  # fmt: skip
    trained_here(asked, num_epochs=0.2)
    for changed in (None, LORA | {"rank": 5}, LORA | {"targets": ["to_q"]}):
        with pytest.raises(Refused, match="set `lora` back"):
            trained_here(asked, num_epochs=0.2, lora=changed)
    with pytest.raises(Refused, match="alpha"):
        trained_here(asked, num_epochs=0.2, lora=LORA | {"alpha": 9})
    other = tmp_path / "other"
    other.mkdir()
    for path in micro_init.glob("*.*"):
        data = bytearray(path.read_bytes())
        if path.name == WEIGHTS_NAME:
            data[-1] ^= 1
        (other / path.name).write_bytes(data)
    with pytest.raises(Refused, match="trained beside"):
        trained_here(asked, num_epochs=0.2, init=other)
    full = trained_here({**asked, "out": tmp_path / "full"}, num_epochs=0.2, lora=None)
    with pytest.raises(BadUsage, match="--adapter wants a run with `lora`"):
        export(full, tmp_path / "none", form="adapter")


@pytest.mark.parametrize(("changes", "what"), [
    ({"lora": LORA | {"targets": ["to_qq"]}}, "ends with 'to_qq'; found: attn1.to_k"),
    ({"lora": LORA | {"targets": ["patch_embedding"]}}, "no linear layer"),
    ({"lora": LORA | {"targets": []}}, "lora.targets"),
    ({"frozen": ["blocks.0."]}, "frozen and lora"),
    ({"muon": {"lr": 1e-3}}, "muon and lora"),
])  # fmt: skip
def test_a_wish_that_means_nothing_is_refused(changes: dict[str, Any], what: str, asked: dict[str, Any]) -> None:
    with pytest.raises(BadUsage) as fault:
        trained_here(asked, **changes)
    assert what in str(fault.value)


def test_without_peft_training_names_the_extra_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], straight: Path, micro_init: Path
) -> None:
    theirs = asked_of(adapted(micro_init, load_file(checkpoints(straight)[-1] / EMA_NAME)))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadUsage, match=r"\.\[lora\]"):
        require_extras(check(TrainConfig, asked, source="test"))
    require_extras(check(TrainConfig, asked | {"lora": None}, source="test"))
    np.testing.assert_allclose(asked_of(open_run(straight).student), theirs, atol=1e-5)
