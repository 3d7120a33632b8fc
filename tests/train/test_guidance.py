"""A student that is told the guidance: how w is drawn, what it learns of it, and how it becomes a plain one again."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.config import check
from common.errors import BadUsage, Refused, Stopped
from common.record import Contract
from common.shards import ShardSet
from tests.made import command, made_contract, made_record, trained_here
from train.chosen import first_records
from train.config import TrainConfig
from train.dist import World
from train.evaluate import evaluate
from train.export import export
from train.feed.data import Step
from train.guidance import Drawn
from train.held_out import micro_of
from train.objective import objective_of
from train.run_folder import EMA_NAME, MODEL_NAME, OPTIMIZER_NAME, checkpoints, read_metrics
from train.sample import draw, open_run
from train.start import first_student, new_state
from train.step import Stepper
from train.student.guidance import hearing
from train.student.network import WanLite, load_student

HOST = torch.device("cpu")
ALONE = World(rank=0, size=1, device=HOST)


def drawn(contract: Contract | None = None, *, seed: int = 0) -> Drawn:
    return Drawn(low=1.0, high=6.0, seed=seed, contract=contract or made_contract())


def settings(folder: Path, set_path: Path, init: Path) -> dict[str, Any]:
    return {"set": set_path, "init": init, "out": folder / "run", "batch_size": 4, "global_batch": 8, "num_epochs": 8,
            "warmup_steps": 1, "checkpoint_every": 100, "log_every": 9, "threads": 1, "device": "cpu", "lr": 3e-3,
            "ema_decay": 0.9, "guidance": {"low": 1.0, "high": 6.0}}  # fmt: skip


@pytest.fixture
def asked(tmp_path: Path, micro_set: Path, micro_init: Path) -> dict[str, Any]:
    return settings(tmp_path, micro_set, micro_init)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, micro_set: Path, micro_init: Path) -> Path:
    """180 steps."""
    values = settings(tmp_path_factory.mktemp("told"), micro_set, micro_init)
    return trained_here(values, num_epochs=20, save_samples=True, sample_interval=20)


def question(w: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    latents, text = torch.randn(2, 16, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
    return latents, torch.tensor([900.0, 100.0]), text, torch.tensor([7, 4]), torch.full((2,), w)


def test_w_is_a_function_of_seed_and_position() -> None:
    whole = drawn().at(0, 1000)
    assert whole.min() >= 1 and whole.max() <= 6 and 3.3 < whole.mean() < 3.7 and len(whole.unique()) > 990
    for first, num in ((0, 3), (3, 1), (4, 9), (13, 500), (998, 2)):
        assert torch.equal(drawn().at(first, num), whole[first : first + num])
    assert torch.equal(drawn().at(5_000_000_000, 4)[2:], drawn().at(5_000_000_002, 2))
    assert not torch.equal(drawn(seed=1).at(0, 8), whole[:8])


def test_each_sample_has_its_w_on_however_many_ranks(asked: dict[str, Any]) -> None:
    """Two ranks of two micro-batches of three: what they draw, laid together by stride, is what one draws."""
    config = check(TrainConfig, asked, source="test")
    contract = ShardSet.open(config.set).contract
    objective = objective_of(config, contract)
    state = new_state(first_student(config), config, ALONE)
    state.samples_seen = 37
    micro = micro_of([(record, 0) for record in first_records(ShardSet.open(config.set), 3)], None, text_rows=9)
    step = Step(micros=(micro, micro), samples=(None,) * 12, epoch=0, cursor={})  # type: ignore[arg-type]
    of_ranks = []
    for rank in range(2):
        world = World(rank=rank, size=2, device=HOST)
        parts = Stepper(config, world, state, objective, None, 10)._guidance(step)
        assert [len(part) for part in parts if part is not None] == [3, 3]
        of_ranks.append(torch.cat([part for part in parts if part is not None]))
    assert objective.drawn is not None
    assert torch.equal(torch.stack(of_ranks, dim=1).flatten(), objective.drawn.at(37, 12))


def test_the_target_is_at_the_w_that_the_student_is_told() -> None:
    contract = made_contract(guidance=(4.0, 3.0))
    values = {"set": "s", "init": "i", "out": "o", "guidance": {"low": 1, "high": 6}}
    objective = objective_of(check(TrainConfig, values, source="test"), contract)
    record = made_record(1, contract)
    micro = micro_of([(record, point) for point in range(contract.keep)], None, text_rows=9)
    cond, uncond = record.cond.astype(np.float32), record.uncond.astype(np.float32)
    own = torch.tensor([4.0, 3.0])[torch.from_numpy(record.expert.astype(np.int64))]
    for w, expected in ((torch.tensor([1.5, 5.5]), torch.tensor([1.5, 5.5])), (None, own)):
        answer = objective.ask(micro, w)
        assert answer.guidance is not None and torch.equal(answer.guidance, expected)
        weight = expected.numpy()[:, None, None, None]
        np.testing.assert_allclose(answer.target, uncond + weight * (cond - uncond), rtol=1e-5, atol=1e-6)


def test_on_a_walk_the_sets_own_w_is_that_of_the_steps_expert() -> None:
    own = drawn(made_contract(guidance=(4.0, 3.0), boundary=0.875)).own(torch.tensor([1000.0, 875.0, 874.9, 1.0]))
    assert own.tolist() == [4.0, 4.0, 3.0, 3.0]


def test_a_student_that_begins_to_hear_answers_as_before(micro_init: Path) -> None:
    plain = load_student(micro_init).eval()
    student = hearing(plain).eval()
    assert hearing(student) is student
    with torch.inference_mode():
        *rest, w = question(3.0)
        assert torch.equal(student(*rest, w), plain(*rest)) and torch.equal(student(*rest, w * 2), plain(*rest))
        with pytest.raises(AssertionError):
            student(*rest)
        with pytest.raises(AssertionError):
            plain(*rest, w)


def test_stopped_after_any_step_it_goes_on_to_the_same_bits(asked: dict[str, Any], tmp_path: Path) -> None:
    straight = trained_here(asked, out=tmp_path / "straight", num_epochs=0.6)
    for _ in range(3):
        with pytest.raises(Stopped):
            trained_here(asked, num_epochs=0.6, limit_s=0.0)
    trained_here(asked, num_epochs=0.6)
    for name in (MODEL_NAME, EMA_NAME, OPTIMIZER_NAME):
        mine, theirs = (checkpoints(out)[-1] / name for out in (asked["out"], straight))
        assert mine.read_bytes() == theirs.read_bytes(), name
    with pytest.raises(Refused, match="guidance"):
        trained_here(asked, num_epochs=0.6, guidance={"low": 1.0, "high": 7.0})


def error_at(student: Any, set_path: Path, w: float, told: float) -> float:
    """Against the teacher's answer at w, by a student who is told `told`."""
    shards = ShardSet.open(set_path)
    records = first_records(shards, 24)
    micro = micro_of([(record, k) for record in records for k in range(3)], None, text_rows=512)
    values = {"set": "s", "init": "i", "out": "o", "guidance": {"low": 1, "high": 6}}
    asked = objective_of(check(TrainConfig, values, source="test"), shards.contract).ask(micro, torch.full((72,), w))
    text, lengths = micro.text.float()[micro.inverse], micro.lengths[micro.inverse]
    with torch.inference_mode():
        answer = student(asked.latents, asked.timesteps, text, lengths, torch.full((72,), told))
    return float((answer - asked.target).square().mean())


def test_it_learns_what_w_means(told: Path, micro_set: Path, micro_init: Path) -> None:
    """At each end of the range it is nearer to its teacher when it is told the truth."""
    losses = [line["loss"] for line in read_metrics(told) if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    student = open_run(told).student
    for w, other in ((1.0, 6.0), (6.0, 1.0)):
        assert error_at(student, micro_set, w, w) < 0.85 * error_at(student, micro_set, w, other), w
    untrained = hearing(load_student(micro_init)).eval()
    assert error_at(student, micro_set, 6.0, 6.0) < 0.5 * error_at(untrained, micro_set, 6.0, 6.0)
    assert evaluate(told, num=3, steps=2, grader=None)["records"] == 3


def test_at_one_w_it_is_a_plain_student_that_diffusers_opens(tmp_path: Path, told: Path) -> None:
    from diffusers import WanTransformer3DModel

    student = open_run(told).student
    with pytest.raises(BadUsage, match=r"the set's own are \[3.0, 4.0\]"):
        export(told, tmp_path / "which", form="diffusers")
    with pytest.raises(Refused, match="trained at 1 to 6"):
        export(told, tmp_path / "far", form="diffusers", guidance=7.5)
    assert not list(tmp_path.glob("which*")) and not list(tmp_path.glob("far*"))
    for w in (1.0, 4.5):
        done = command("train", "export", told, "--out", tmp_path / f"at{w}", "--guidance", str(w))
        assert done.returncode == 0, done.stderr
        stock = WanTransformer3DModel.from_pretrained(tmp_path / f"at{w}" / "transformer").eval()
        latents, times, text, lengths, told_w = question(w)
        padded = torch.zeros(2, 512, 32)
        for row, length in enumerate(lengths):
            padded[row, :length] = text[row, :length]
        with torch.inference_mode():
            theirs = stock(latents.unsqueeze(2), times, padded).sample.squeeze(2)
            mine = student(latents, times, text, lengths, told_w)
        torch.testing.assert_close(theirs, mine, rtol=0, atol=2e-5)
        assert f"{w:g}, baked in" in (tmp_path / f"at{w}" / "README.md").read_text()


def test_as_wanlite_it_keeps_its_ear_and_can_begin_another_run(
    tmp_path: Path, told: Path, asked: dict[str, Any]
) -> None:
    export(told, tmp_path / "kept", form="wanlite")
    kept, student = load_student(tmp_path / "kept").eval(), open_run(told).student
    with torch.inference_mode():
        assert torch.equal(kept(*question(2.0)), student(*question(2.0)))
    again = trained_here(asked, init=tmp_path / "kept", num_epochs=0.3)
    assert open_run(again).student.config.guidance_embeds
    with pytest.raises(BadUsage, match="one w for an init that is told of it"):
        trained_here(asked, out=tmp_path / "other", init=tmp_path / "kept", guidance=None)
    export(told, tmp_path / "baked", form="wanlite", guidance=2.0)
    baked = load_student(tmp_path / "baked").eval()
    with torch.inference_mode():
        torch.testing.assert_close(baked(*question(2.0)[:4]), student(*question(2.0)), rtol=0, atol=1e-5)


def test_pictures_are_drawn_at_the_w_that_is_asked_for(tmp_path: Path, told: Path) -> None:
    trained = open_run(told)
    records, grid = first_records(trained.shards, 3), trained.objective.grid(3)
    own, low, high = (draw(trained.answer(w), records, grid, HOST) for w in (None, 1.0, 6.0))
    assert (low - high).abs().max() > 1e-3 and not torch.equal(own, high)
    done = command("train", "sample", told, "--out", tmp_path / "p.png", "--num", "2", "--guidance", "9")
    assert done.returncode == 4 and "trained at 1 to 6" in done.stderr
    done = command("train", "sample", told, "--out", tmp_path / "p.png", "--num", "2", "--guidance", "2",
                   "--device", "cpu", "--steps", "2")  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "p.png").stat().st_size > 500, done.stderr


def test_who_was_trained_at_one_w_takes_no_other(tmp_path: Path, asked: dict[str, Any]) -> None:
    plain = trained_here(asked, guidance=None, num_epochs=0.2)
    assert not open_run(plain).student.config.guidance_embeds
    with pytest.raises(Refused, match="inside its answers"):
        open_run(plain).answer(2.0)
    for form in ("diffusers", "wanlite"):
        with pytest.raises(Refused, match="inside its answers"):
            export(plain, tmp_path / "no", form=form, guidance=2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("changes", "fault", "what"), [
    ({"guidance": {"low": 5, "high": 1}}, BadUsage, "high must be larger than low"),
    ({"guidance": {"low": 1, "high": 5, "middle": 3}}, BadUsage, "unknown key 'guidance.drawn.middle'"),
    ({"guidance": {"low": 1, "high": 3.5}}, Refused, "low: 1, high: 4"),
    ({"objective": "segment", "segments": 2}, Refused, "1 to 6, the paths were walked"),
    ({"lora": {"rank": 2}}, BadUsage, "adapters cannot learn to hear it"),
])  # fmt: skip
def test_a_wish_that_cannot_be_met_is_refused(
    changes: dict[str, Any], fault: type[Exception], what: str, asked: dict[str, Any]
) -> None:
    with pytest.raises(fault) as raised:
        trained_here(asked, **changes)
    assert what in str(raised.value)


def test_files_of_students_before_it_still_open(micro_init: Path) -> None:
    config = load_student(micro_init).config
    assert "guidance_embeds" not in config.to_dict() and type(config).from_dict(config.to_dict()) == config
    heard = dataclasses.replace(config, guidance_embeds=True)
    assert heard.to_dict()["guidance_embeds"] is True and type(config).from_dict(heard.to_dict()) == heard
    names = {name for name, _ in WanLite(heard).named_parameters()} - {
        name for name, _ in WanLite(config).named_parameters()
    }
    assert len(names) == 4 and load_file(micro_init / "model.safetensors").keys().isdisjoint(names)
