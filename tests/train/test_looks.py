"""Looks at a student: what they need is there at the start or refused, afterwards they never end a run, and one curve
is of the same records from beginning to end."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import check as checked
from common.errors import BadUsage, Corrupt, Fault, Stopped
from common.shards import ShardSet, is_held_out
from harvest.config import ImagesConfig
from tests.made import harvest_config, harvest_here, trained_here, write_student_json
from train.check import check
from train.chosen import Chosen, found_first, found_held_out, records_of_prompts, skipping, strict
from train.config import TrainConfig
from train.dist import World
from train.evaluate import evaluate, report_lines
from train.held_out import HeldOut
from train.run_folder import read_metrics
from train.watched import Watched
from train.watching import Onlooker

NUMBERED = [f"a cat number {number}" for number in range(600)]
HELD_OUT = [prompt for prompt in NUMBERED if is_held_out(prompt)][:8]
OTHERS = [prompt for prompt in NUMBERED if not is_held_out(prompt)][:8]


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory: pytest.TempPathFactory, micro_wan: Path) -> Path:
    """Four shards of two held-out records and two others. Read-only by agreement."""
    folder = tmp_path_factory.mktemp("looked-at")
    pairs = (HELD_OUT[begin : begin + 2] + OTHERS[begin : begin + 2] for begin in range(0, 8, 2))
    (folder / "prompts.txt").write_text("\n".join(prompt for four in pairs for prompt in four))
    return harvest_here(harvest_config(folder / "set", micro_wan, prompts={"seeds_per_prompt": 1}))


@pytest.fixture
def settings(tmp_path: Path, whole_set: Path, micro_init: Path) -> dict[str, Any]:
    """Of a set of one's own; twelve steps, six an epoch once all shards are there."""
    shutil.copytree(whole_set, tmp_path / "set")
    return {"set": tmp_path / "set", "init": micro_init, "out": tmp_path / "run", "batch_size": 4, "num_epochs": 2,
            "warmup_steps": 1, "log_every": 1, "checkpoint_every": 2, "threads": 1, "device": "cpu",
            "deadline_s": 60}  # fmt: skip


def gaps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if line.get("event") == "held_out"]


def told_by(run: Path) -> str:
    return (run / "log.txt").read_text()


def damage(shards: ShardSet, chosen: Chosen) -> str:
    """One bit of a record's points; its key."""
    receipt = shards.manifest().by_item[chosen.item]
    path = next(path for name, path in receipt.paths(shards.shards_dir).items() if "/points/0" in name)
    data = bytearray(path.read_bytes())
    data[int((chosen.number + 0.5) * len(data) / receipt.num_records)] ^= 1
    path.write_bytes(data)
    return chosen.key


def damage_first_held_out(set_path: Path) -> str:
    shards = ShardSet.open(set_path)
    return damage(shards, found_held_out(shards, shards.manifest().receipts, 1, strict)[0][0])


@pytest.fixture
def hidden(settings: dict[str, Any], tmp_path: Path) -> Iterator[Callable[[], None]]:
    """The shards but the first are not committed yet; a call commits them."""
    shards = ShardSet.open(settings["set"])
    late = [shards.receipt_path(receipt.item) for receipt in shards.manifest().receipts[1:]]
    away = [path.rename(tmp_path / path.name) for path in late]
    yield lambda: [shutil.move(path, target) for path, target in zip(away, late, strict=True)] and None


def test_a_damaged_record_is_passed_over_or_ends_the_run_before_its_first_step(settings: dict[str, Any]) -> None:
    settings["save_samples"] = True
    key = damage_first_held_out(settings["set"])
    with pytest.raises(Corrupt, match=key):
        trained_here(settings)
    assert not [line for line in read_metrics(settings["out"]) if "loss" in line]
    run = trained_here(settings, on_corrupt="skip")
    assert told_by(run).count("passed over a damaged record") == 1 and key in told_by(run)
    assert {line["points"] for line in gaps_of(run)} == {7 * 3}
    watched = Watched.read(run)
    assert len(watched.held_out) == 7 and len(watched.pictures) == 8, "the next one takes its place"
    assert key not in {each.key for each in watched.held_out + watched.pictures}
    assert evaluate(run, num=8, steps=1, grader=None)["held_out"]["gap"] == pytest.approx(gaps_of(run)[-1]["gap"])


def test_a_damaged_record_of_a_named_prompt_gives_way_to_another_seeds(micro_set: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(shutil.copytree(micro_set, tmp_path / "set"))
    (first, record), *_ = found_first(shards, shards.manifest().receipts, 1, strict)
    damage(shards, first)
    with pytest.raises(Corrupt, match=first.key):
        records_of_prompts(shards, [record.prompt])
    said: list[str] = []
    (other,) = records_of_prompts(shards, [record.prompt], skipping(lambda _, **facts: said.append(str(facts["why"]))))
    assert other.prompt == record.prompt and other.key != first.key and len(said) == 1 and first.key in said[0]


def test_what_was_chosen_stays_chosen_until_other_pictures_are_named(settings: dict[str, Any]) -> None:
    """A set that grows may hold another record of a prompt before the one that was drawn."""
    settings |= {"num_epochs": 0.2, "save_samples": True}
    watched = Watched.read(run := trained_here(settings, sample_prompts=OTHERS[:2]))
    assert len(watched.pictures) == 2
    another = dataclasses.replace(watched, pictures=watched.held_out[:2], held_out=watched.held_out[1:])
    another.write(run)
    trained_here(settings, sample_prompts=OTHERS[:2])
    assert Watched.read(run) == another
    trained_here(settings, sample_prompts=OTHERS[1:3])
    assert Watched.read(run).pictures[0] == watched.pictures[1] and "other records" not in told_by(run)


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def flip(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-500] ^= 4
    path.write_bytes(data)


def lose_weights_of_an_older_release(folder: Path) -> None:
    """Without seals."""
    shutil.rmtree(folder.parent / "seals" / folder.name)
    next(folder.glob("*.safetensors")).unlink()


@pytest.mark.parametrize("harm", [remove, flip, lose_weights_of_an_older_release])
def test_a_damaged_autoencoder_is_named_before_the_first_step(settings: dict[str, Any], harm: Any) -> None:
    harm(settings["set"] / "assets" / "vae")
    with pytest.raises(Fault, match="assets/vae"):
        trained_here(settings, save_samples=True)
    assert not [line for line in read_metrics(settings["out"]) if "loss" in line]
    trained_here(settings, num_epochs=0.5)


def test_a_folder_that_cannot_be_written_is_named_before_the_first_step(settings: dict[str, Any]) -> None:
    (settings["set"].parent / "file").write_text("")
    with pytest.raises(BadUsage, match="sample_dir"):
        trained_here(settings, save_samples=True, sample_dir=settings["set"].parent / "file")
    assert not [line for line in read_metrics(settings["out"]) if "loss" in line]


def test_what_vanishes_while_a_run_goes_on_costs_looks_and_not_the_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The autoencoder and the init, gone after the start."""
    settings["init"] = shutil.copytree(settings["init"], tmp_path / "init")
    real = Onlooker.measure

    def gone(self: Onlooker, *given: Any) -> None:
        for folder in (settings["set"] / "assets" / "vae", settings["init"]):
            shutil.rmtree(folder, ignore_errors=True)
        real(self, *given)

    monkeypatch.setattr(Onlooker, "measure", gone)
    run = trained_here(settings, save_samples=True)
    assert told_by(run).count("pictures left out") == 1, "said when it is new"
    gaps = gaps_of(run)
    assert len(gaps) == 6 and all(line["untrained_gap"] > 0.5 for line in gaps), "measured at the start"


def test_a_run_is_measured_though_its_init_is_gone(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["init"] = shutil.copytree(settings["init"], tmp_path / "init")
    run = trained_here(settings)
    shutil.rmtree(settings["init"])
    report = evaluate(run, num=2, steps=1, grader=None)
    assert report["held_out"]["gap"] == pytest.approx(gaps_of(run)[-1]["gap"], rel=1e-5) and report["psnr"] > 0
    assert report["held_out"]["untrained"] is None and str(settings["init"]) in "\n".join(report_lines(report))


def test_a_set_that_cannot_be_decoded_is_trained_checked_and_measured(tmp_path: Path) -> None:
    """Stable Diffusion's autoencoder is not Wan's."""
    from tests.micro_sd import write_micro_sd
    from train.student.fitting import fitted
    from train.student.fresh import start_fresh

    (tmp_path / "prompts.txt").write_text("\n".join(HELD_OUT[:2] + OTHERS[:6]))
    folder = write_micro_sd(tmp_path / "sd")
    shards = ShardSet.open(harvest_here(harvest_config(tmp_path / "set", folder, guidance=(5.0,))))
    (tmp_path / "init").mkdir()
    student = fitted(write_student_json(tmp_path / "s.json"), shards, mended_path=tmp_path / "init" / "student.json")
    start_fresh(student, tmp_path / "init")
    values = {"set": shards.path, "init": tmp_path / "init", "out": tmp_path / "run", "batch_size": 4, "num_epochs": 1,
              "warmup_steps": 1, "threads": 1, "device": "cpu", "save_samples": True}  # fmt: skip
    check(checked(TrainConfig, values, source="test"), World(rank=0, size=1, device=torch.device("cpu")))
    run = trained_here(values)
    assert told_by(run).count("no pictures are drawn") == 1 and not (run / "samples").exists()
    report = evaluate(run, num=4, steps=1, grader=lambda picture, prompt: True)
    assert report["held_out"]["gap"] == pytest.approx(gaps_of(run)[-1]["gap"], rel=1e-5)
    assert "psnr" not in report and "graded" not in report and "AutoencoderKL" in "\n".join(report_lines(report))


def test_a_curve_is_of_the_same_records_however_the_set_grows(settings: dict[str, Any], hidden: Any) -> None:
    """At a rate of nothing the student does not move; nor may its gap. A run of an older release has not written
    what it chose: that is found again from its first epoch."""
    settings |= {"lr": 1e-12, "num_epochs": 12, "save_samples": True}
    with pytest.raises(Stopped):
        trained_here(settings, limit_s=0.0)
    before = Watched.read(settings["out"])
    hidden()
    (settings["out"] / "watched.json").unlink()
    with pytest.raises(Stopped):
        trained_here(settings, limit_s=0.0)
    assert Watched.read(settings["out"]).held_out == before.held_out
    run = trained_here(settings)
    after = Watched.read(run)
    assert (after.held_out, after.pictures) == (before.held_out, before.pictures) and len(after.held_out) == 2
    assert len(json.loads(max((run / "epochs").iterdir()).read_bytes())["items"]) == 4
    gaps = gaps_of(run)
    assert len(gaps) > 5 and len({round(line["gap"], 5) for line in gaps}) == 1
    assert {round(line["untrained_gap"], 5) for line in gaps} == {round(gaps[0]["gap"], 5)}


def test_held_out_records_that_are_committed_later_are_measured_then(
    settings: dict[str, Any], tmp_path: Path, micro_wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "prompts.txt").write_text("\n".join(OTHERS[:4] + HELD_OUT[:4]))
    set_path = harvest_here(harvest_config(tmp_path / "apart" / "set", micro_wan, prompts={"seeds_per_prompt": 1}))
    shards = ShardSet.open(set_path)
    (late,) = [receipt for receipt in shards.manifest().receipts if receipt.held_out_records().any()]
    path = shards.receipt_path(late.item)
    path.rename(tmp_path / path.name)
    real = Onlooker.measure

    def committed_meanwhile(self: Onlooker, state: Any, log: Any) -> None:
        real(self, state, log)
        if state.step == 2:
            shutil.move(tmp_path / path.name, path)

    monkeypatch.setattr(Onlooker, "measure", committed_meanwhile)
    run = trained_here(settings, set=set_path, num_epochs=4, batch_size=3)
    assert "holds no held-out record yet" in told_by(run)
    gaps = gaps_of(run)
    assert gaps and gaps[0]["step"] > 2 and all(line["untrained_gap"] > 0.3 for line in gaps)
    assert [line["step"] for line in gaps] == list(range(gaps[0]["step"], gaps[-1]["step"] + 1, 2))


def test_one_out_of_memory_is_one_hole(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = HeldOut.gap, []

    def full_at_first(self: HeldOut, student: Any) -> Any:
        asked.append(student)
        if len(asked) in (1, 2, 5):  # the untrained student at the start and beside the first look, and the second look
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, student)

    monkeypatch.setattr(HeldOut, "gap", full_at_first)
    run = trained_here(settings)
    assert [line["step"] for line in gaps_of(run)] == [2, 6, 8, 10, 12]
    first, *others = (line["untrained_gap"] for line in gaps_of(run))
    assert first is None and len(set(others)) == 1 and others[0] > 0.5
    assert told_by(run).count("left out: out of memory") == 2, "said when it is new"


def test_a_record_that_is_damaged_between_two_starts_makes_a_new_curve_and_says_so(settings: dict[str, Any]) -> None:
    settings |= {"on_corrupt": "skip", "lr": 1e-12}
    with pytest.raises(Stopped):
        trained_here(settings, limit_s=0.0)
    before = Watched.read(settings["out"])
    key = damage_first_held_out(settings["set"])
    run = trained_here(settings)
    after = Watched.read(run)
    assert set(after.held_out) == {each for each in before.held_out if each.key != key} and len(after.held_out) == 7
    assert "not to be compared with what it was records=7 before=8" in told_by(run)
    assert before.untrained_gap and after.untrained_gap != before.untrained_gap
    assert {round(line["untrained_gap"], 5) for line in gaps_of(run)} == {round(gaps_of(run)[0]["gap"], 5)}
    (run / "watched.json").write_text("[]")
    with pytest.raises(Corrupt, match=r"watched\.json"):
        trained_here(settings)


class Killed(BaseException):
    """As by SIGKILL: nobody mends it."""


def test_looks_at_the_end_are_made_by_the_next_start_and_once(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"num_epochs": 1, "checkpoint_every": 100, "save_samples": True}

    def dies(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Onlooker, "measure", dies)
        trained_here(settings)
    assert not gaps_of(settings["out"])
    for _ in range(2):
        run = trained_here(settings)
        assert [line["step"] for line in gaps_of(run)] == [6]
        assert len([line for line in read_metrics(run) if line.get("event") == "pictures"]) == 1
        assert len(list((run / "samples").glob("epoch_0001_sample_*.png"))) == 8


def test_a_wish_to_stop_at_the_last_step_leaves_no_look_out(settings: dict[str, Any]) -> None:
    run = trained_here(settings, num_epochs=0.1, limit_s=0.0)
    assert [line["step"] for line in gaps_of(run)] == [1]


def test_a_report_does_not_call_unlike_things_alike(tmp_path: Path, settings: dict[str, Any], micro_wan: Path) -> None:
    """A picture of one's own was not drawn from a record's noise; a student may have been taught another guidance."""
    folder = tmp_path / "own" / "pictures"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(OTHERS[number])
    own = harvest_config(tmp_path / "own" / "set", micro_wan, source="images", prompts=None,
                         images=ImagesConfig(path=folder))  # fmt: skip
    run = trained_here(settings, set=harvest_here(own), out=tmp_path / "own" / "run", num_epochs=1)
    report = evaluate(run, num=2, steps=1, grader=lambda picture, prompt: True)
    assert "psnr" not in report and report["graded"] == {"score": {"student": 1.0, "set": 1.0, "ratio": 1.0}}
    told = "\n".join(report_lines(report))
    assert "PSNR against" not in told and "source: images" in told and "teacher 1.0" not in told
    report = evaluate(trained_here(settings, guidance=[1.0, 1.0], num_epochs=0.5), num=2, steps=1, grader=None)
    assert report["guidance"] == {"student": [1.0, 1.0], "set": [4.0, 3.0]}
    assert "taught 1, 1," in (told := "\n".join(report_lines(report))) and "4, 3" in told and "PSNR against" in told
