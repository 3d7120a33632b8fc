"""What a run withstands: kills at any micro-batch, another trainer, another configuration, numbers that are none,
too little memory, a disk that fails. In process: a run that ends by an exception leaves what a killed one leaves."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.claim import claimed
from common.config import check
from common.errors import Corrupt, Partial, Refused, Stopped
from common.shards import ShardSet
from train.config import TrainConfig
from train.dist import World
from train.loop import train
from train.run_folder import EMA_NAME, LOCK_NAME, MODEL_NAME, OPTIMIZER_NAME, checkpoints, read_metrics, status_lines
from train.start import new_state, open_student
from train.state import Keep, snapshot_of, verified, verify_lines, write_checkpoint
from train.student.weights import safetensors_stream

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
FILES = (MODEL_NAME, EMA_NAME, OPTIMIZER_NAME)
TIMES = {"time", "steps_per_s", "samples_per_s", "data_wait", "peak_bytes"}


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture
def settings(tmp_path: Path, micro_set: Path, micro_init: Path) -> dict[str, Any]:
    """72 training points: 27 steps of 8 in three epochs, two micro-batches each."""
    return {"set": micro_set, "init": micro_init, "out": tmp_path / "run", "batch_size": 4, "global_batch": 8,
            "num_epochs": 3, "warmup_steps": 5, "checkpoint_every": 5, "log_every": 3, "threads": 1, "device": "cpu",
            "deadline_s": 60}  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, micro_set: Path, micro_init: Path) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    run(settings.__wrapped__(out.parent, micro_set, micro_init))  # type: ignore[attr-defined]
    return out


def run(settings: dict[str, Any], *, limit_s: float | None = None, **changes: Any) -> Path:
    config = check(TrainConfig, settings | changes, source="test")
    train(config, ALONE, limit_s=limit_s)
    return config.out


def same(one: Path, other: Path) -> None:
    assert checkpoints(one)[-1].name == checkpoints(other)[-1].name
    for name in FILES:
        assert (checkpoints(one)[-1] / name).read_bytes() == (checkpoints(other)[-1] / name).read_bytes(), name
    mine, theirs = by_step(one), by_step(other)
    assert mine.keys() == theirs.keys() and all(mine[step] == theirs[step] for step in theirs)


def by_step(out: Path) -> dict[int, list[dict[str, Any]]]:
    """Every line about a step, without the clock; one that was written twice must say the same."""
    lines: dict[int, list[dict[str, Any]]] = {}
    for line in read_metrics(out):
        if "step" in line:
            facts = {name: value for name, value in line.items() if name not in TIMES}
            told = lines.setdefault(line["step"], [])
            if facts not in told:
                told.append(facts)
    return lines


def say(out: Path) -> str:
    return (out / "log.txt").read_text()


@pytest.fixture
def at_micro(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Tensor], Tensor]], None]:
    """Does something to the errors of the n-th micro-batch from now on."""
    import train.step

    def arrange(number: int, act: Callable[[Tensor], Tensor]) -> None:
        real, seen = train.step.__dict__["error_of"], [0]

        def error_of(*inputs: Any) -> Tensor:
            seen[0] += 1
            errors: Tensor = real(*inputs)
            return act(errors) if seen[0] == number else errors

        monkeypatch.setattr(train.step, "error_of", error_of)

    return arrange


def dies(errors: Tensor) -> Tensor:
    raise Killed


@pytest.mark.parametrize("micro", [3, 12, 18, 31, 52])
def test_killed_at_any_micro_batch_it_goes_on_to_the_same_bits(
    micro: int, settings: dict[str, Any], straight: Path, at_micro: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first checkpoint, in the middle of an accumulation (even numbers), at an epoch's edge (step 9)."""
    with monkeypatch.context(), pytest.raises(Killed):
        at_micro(micro, dies)
        run(settings)
    monkeypatch.undo()
    same(run(settings), straight)


def test_asked_to_stop_between_two_lines_the_next_line_is_the_same(settings: dict[str, Any], straight: Path) -> None:
    """A time limit of nothing: one step a start. What is summed for the log is part of the state."""
    for _ in range(4):
        with pytest.raises(Stopped, match="time limit"):
            run(settings, limit_s=0.0)
    same(run(settings), straight)


def test_a_second_trainer_is_told_who_is_first(settings: dict[str, Any]) -> None:
    with claimed(settings["out"] / LOCK_NAME, "the run"), pytest.raises(Refused, match=r"process \d+ on \S+ since"):
        run(settings)
    assert not (settings["out"] / "heartbeat.json").exists(), "the first one's heartbeat is not touched"


def test_what_changes_the_run_is_refused_and_what_does_not_is_said(settings: dict[str, Any], straight: Path) -> None:
    shutil.copytree(straight, settings["out"])
    with pytest.raises(Refused) as refused:
        run(settings, lr=3e-3, guidance=[1.0, 1.0], log_every=7)
    assert "lr: 0.001 | 0.003" in refused.value.found and "guidance: None | [1.0, 1.0]" in refused.value.found
    assert "log_every" not in refused.value.found and "another `out`" in refused.value.mend
    run(settings, log_every=7, global_batch=None, batch_size=8)
    assert "log_every=3->7" in say(settings["out"]) and "batch_size=4->8" in say(settings["out"])


def test_milestones_stay_and_the_others_go(settings: dict[str, Any]) -> None:
    out = run(settings, keep_checkpoints=2, keep_every=10)
    assert [int(folder.name) // 8 for folder in checkpoints(out)] == [10, 20, 25, 27]


def test_verify_names_what_is_damaged(settings: dict[str, Any], straight: Path) -> None:
    shutil.copytree(straight, settings["out"])
    assert all("bytes match" in line for line in verify_lines(settings["out"]))
    for name in (*FILES, "state.json"):
        damaged = settings["out"].parent / name
        shutil.copytree(checkpoints(straight)[-1], damaged)
        data = (damaged / name).read_bytes()
        (damaged / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(Corrupt):
            list(verify_lines(damaged))


@pytest.mark.parametrize("how", ["flipped", "truncated", "gone"])
@pytest.mark.parametrize("name", [*FILES, "state.json"])
def test_a_damaged_checkpoint_is_passed_over_aloud(
    name: str, how: str, settings: dict[str, Any], straight: Path
) -> None:
    shutil.copytree(straight, settings["out"])
    older, newer = checkpoints(settings["out"])
    data = bytearray((newer / name).read_bytes())
    if how == "flipped":
        data[data.index(b'"step": 27') + 8 if name == "state.json" else len(data) // 2] ^= 1  # still JSON: step 37
    (newer / name).write_bytes(data[: len(data) // 2] if how == "truncated" else data)
    if how == "gone":
        (newer / name).unlink()
    run(settings)
    told = say(settings["out"])
    assert "passing over" in told and f"resumed from {older.name}" in told
    same(settings["out"], straight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_changes_no_weight_and_names_its_sample(
    value: float, settings: dict[str, Any], straight: Path, at_micro: Any
) -> None:
    """The second micro-batch of the fourth step, its third sample: 4 + 2 of 8."""

    def poisoned(errors: Tensor) -> Tensor:
        return errors * torch.tensor([1, 1, value, 1])

    at_micro(8, poisoned)
    out = run(settings, checkpoint_every=1, keep_checkpoints=30)
    before, after = (load_file(checkpoints(out)[step] / MODEL_NAME) for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    (line,) = [line for line in read_metrics(out) if line.get("event") == "skipped"]
    assert line["step"] == 3 and len(line["samples"]) == 1 and line["samples"][0] in say(out)
    last = load_file(checkpoints(out)[-1] / MODEL_NAME)
    assert all(tensor.isfinite().all() for tensor in last.values())
    assert by_step(out).keys() == by_step(straight).keys() | {3} | set(range(3, 28, 3))


def test_too_many_such_steps_end_the_run(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import train.step

    real = train.step.error_of
    monkeypatch.setattr(train.step, "error_of", lambda *inputs: real(*inputs) * float("nan"))
    with pytest.raises(Partial, match="10 of the last 10 steps") as fault:
        run(settings)
    assert "lower lr" in fault.value.mend


def test_a_micro_batch_too_large_is_halved_at_the_same_global_batch(
    settings: dict[str, Any], at_micro: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.step

    real = train.step.error_of

    def small_memory(student: Any, question: Any, micro: Any) -> Tensor:
        if len(micro.sigmas) > 2:
            raise torch.OutOfMemoryError("no room")
        return real(student, question, micro)

    told = run(settings, num_epochs=1, batch_size=2)
    monkeypatch.setattr(train.step, "error_of", small_memory)
    with pytest.raises(Partial, match="no room") as fault:
        run(settings, num_epochs=1, out=settings["out"].parent / "exact", batch_size=8)
    assert "weights" in fault.value.found and "batch_size: 4" in fault.value.mend
    fitted = run(settings, num_epochs=1, out=settings["out"].parent / "auto", batch_size=8, fit="auto")
    assert "takes batch_size 2, not 8" in say(fitted)
    same(fitted, told)


def test_a_save_that_fails_is_heard_and_the_one_before_serves(
    settings: dict[str, Any], straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full in the middle of the third checkpoint's second file."""
    import common.files

    real, left = common.files.__dict__["_write_synced"], [9]

    def full(path: Path, content: Any) -> None:
        if path.suffix == ".safetensors":
            left[0] -= 1
            if left[0] == 0:
                path.write_bytes(b"half")
                raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(common.files, "_write_synced", full)
    with pytest.raises(Partial, match="no space left") as fault:
        run(settings)
    assert "the same command again" in fault.value.mend
    monkeypatch.undo()
    assert [int(folder.name) // 8 for folder in checkpoints(settings["out"])] == [5, 10]
    same(run(settings), straight)


def test_what_is_saved_is_the_moment_of_asking(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the steps do to it while it is being written; and its bytes are made one tensor at a time."""
    there: list[int] = []

    def saved_late(*inputs: Any) -> Iterator[bytes | memoryview]:
        there.append(len(list(tmp_path.rglob("*.safetensors"))))
        return safetensors_stream(*inputs)

    monkeypatch.setattr("train.state.safetensors_stream", saved_late)
    config = check(TrainConfig, settings, source="test")
    student = open_student(config, ShardSet.open(config.set).contract)
    state = new_state(student, config, ALONE)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    snapshot = snapshot_of(state, {})
    with torch.no_grad():
        for tensor in (*student.parameters(), *state.ema.values()):
            tensor.zero_()
    folder = write_checkpoint(tmp_path, snapshot, Keep(newest=1))
    for name in (MODEL_NAME, EMA_NAME):
        saved = load_file(folder / name)
        assert all(torch.equal(saved[tensor], before[tensor]) for tensor in before)
    assert there == [1, 2, 3], "the one that is begun, and those before it"


@pytest.mark.parametrize(("precision", "muon"), [("bfloat16", None), ("float16", None), ("float16", {"lr": 4e-3})])
def test_half_precision_and_muon_resume_to_the_same_bits(
    precision: str, muon: dict[str, Any] | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The scale of float16's loss is part of the state: it doubles and halves with the steps that were taken."""
    settings |= {"precision": precision, "muon": muon, "num_epochs": 1}
    whole = run(settings, out=tmp_path / "whole")
    for _ in range(2):
        with pytest.raises(Stopped):
            run(settings, limit_s=0.0)
    same(run(settings), whole)
    facts = verified(checkpoints(whole)[-1])
    assert bool(facts["scaler"]) == (precision == "float16")
    slots = {key.rsplit(":", 1)[1] for key in load_file(checkpoints(whole)[-1] / OPTIMIZER_NAME)}
    assert ("momentum" in slots) == (muon is not None) and "exp_avg" in slots
    assert all(line["loss"] < 10 for line in read_metrics(whole) if "loss" in line)


def test_frozen_parts_stay_and_unknown_ones_are_named(settings: dict[str, Any], micro_init: Path) -> None:
    from common.errors import BadUsage

    out = run(settings, num_epochs=1, frozen=["condition_embedder", "blocks.0."])
    first, last = load_file(micro_init / "model.safetensors"), load_file(checkpoints(out)[-1] / MODEL_NAME)
    for name, tensor in first.items():
        assert torch.equal(tensor, last[name]) == name.startswith(("condition_embedder", "blocks.0.")), name
    with pytest.raises(BadUsage, match="blockz"):
        run(settings, frozen=["blockz"])
    with pytest.raises(BadUsage, match="nothing is left"):
        run(settings, frozen=["patch_embedding", "condition_embedder", "blocks", "proj_out", "scale_shift_table"])
    with pytest.raises(BadUsage, match="nothing is left to it"):
        run(settings, frozen=["condition_embedder", "blocks"], muon={"lr": 4e-3})


def test_checkpointing_in_the_backward_pass_changes_no_bit(settings: dict[str, Any], straight: Path) -> None:
    """Harmless on resume, too: it says how, not what."""
    same(run(settings, gradient_checkpointing=True, ema_on_host=True), straight)


def test_status_and_metrics_tell_the_held_out_gap(straight: Path) -> None:
    lines = read_metrics(straight)
    assert lines[0]["event"] == "start" and lines[0]["ranks"] == 1
    steps = [line for line in lines if "loss" in line]
    assert all(line["peak_bytes"] > 1e7 and 0 <= line["data_wait"] <= 1 for line in steps)
    assert any("step 27: loss" in line for line in status_lines(straight))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_checkpoint_says_its_configuration(straight: Path) -> None:
    state = json.loads((checkpoints(straight)[-1] / "state.json").read_bytes())
    assert state["config"]["lr"] == 1e-3 and state["step"] == 27


@pytest.mark.full
def test_memory_is_flat_over_a_thousand_steps(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident bytes after 200 steps and after 1,200, with checkpoints, held-out forwards and pictures in between."""
    import train.loop

    resident: dict[int, int] = {}
    real = train.loop.Tally.take

    def take(tally: Any) -> dict[str, Any]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident[tally._state.step] = pages * 4096
        return real(tally)

    monkeypatch.setattr(train.loop.Tally, "take", take)
    run(settings, num_epochs=1200 * 8 / 72, log_every=100, checkpoint_every=50, save_samples=True, sample_interval=20)
    assert max(resident) == 1200
    growth = resident[1200] - resident[200]
    assert growth < 8e6, f"{growth / 1e6:.1f} MB more after a thousand steps: {resident}"
