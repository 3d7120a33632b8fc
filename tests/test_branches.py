"""A set that keeps only the guided combination: what the solver got and nothing else, from the harvest to a student."""

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import check as checked
from common.encoding import INT8
from common.errors import Refused
from common.log import Log
from common.record import BOTH, GUIDED, Array, Record
from common.schedule import contract_grid, seeded_noise
from common.shard_header import pack_records, record_of
from common.shards import ASSETS, ShardSet
from harvest.forecast import forecast
from harvest.granary.compare import compare
from harvest.granary.look import describe
from harvest.granary.recompute import recompute
from harvest.granary.repair import repair
from harvest.granary.select import merge
from harvest.granary.verify import verify
from harvest.loading.folder import resolve
from harvest.plan import record_bytes
from harvest.plan_report import tokens_of
from harvest.rollout import _chosen
from harvest.running.health import Health
from harvest.samples import SAMPLES
from harvest.status import lines, survey
from harvest.teachers import facts_of
from tests.made import NUMERICS, command, harvest_config, harvest_here, made_contract, planned, trained_here, tree
from train.check import check
from train.config import TrainConfig
from train.dist import World
from train.evaluate import evaluate
from train.export import export
from train.held_out import HeldOut
from train.objective import objective_of
from train.run_folder import MODEL_NAME, checkpoints, read_metrics
from train.sample import sample
from train.student.network import load_student

Kept = Callable[..., ShardSet]
PROMPT = "a red cat"


def told(out: Path, teacher: Path, encoding: str, branches: str, **changes: Any) -> Any:
    """Every step kept; nothing is rounded on the way where nothing is when it is stored."""
    values: dict[str, Any] = {"encoding": encoding, "branches": branches, "keep": 6, "prompts": {"limit": 3},
                              "latent_dtype": "float32" if encoding == "float32" else "float16"}  # fmt: skip
    return harvest_config(out, teacher, **values | changes)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, micro_wan: Path) -> Kept:
    """The same six records, harvested once for each way to keep them."""

    @functools.cache
    def harvested(encoding: str, branches: str, **changes: Any) -> ShardSet:
        out = tmp_path_factory.mktemp(f"{encoding}-{branches}") / "set"
        samples = (PROMPT,) if branches == GUIDED and not changes else ()
        return ShardSet.open(harvest_here(told(out, micro_wan, encoding, branches, samples=samples, **changes)))

    return harvested


def records(shards: ShardSet) -> list[Record]:
    return [
        shards.read(receipt).record(i) for receipt in shards.manifest().receipts for i in range(receipt.num_records)
    ]


@pytest.mark.parametrize("source", ["trajectory", "renoise"])
def test_what_is_kept_is_the_combination_of_what_both_keep(kept: Kept, source: str) -> None:
    alone, both = (kept("float32", branches, source=source) for branches in (GUIDED, BOTH))
    pairs = list(zip(records(alone), records(both), strict=True))
    assert len(pairs) == 6
    for mine, theirs in pairs:
        assert mine.cond is None and mine.uncond is None and mine.guided is not None
        np.testing.assert_array_equal(mine.guided, theirs.combination(both.contract))
        for name in ("key", "text", "timesteps", "sigmas", "latents", "final"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))


def test_the_solver_walks_by_the_very_numbers_that_are_kept(kept: Kept) -> None:
    shards = kept("float32", GUIDED)
    for record in records(shards):
        sigmas = contract_grid(shards.contract, int(record.key, 16)).sigmas
        state = seeded_noise(record.seed, record.final.shape)
        for point in range(shards.contract.steps):
            np.testing.assert_array_equal(state, record.latents[point])
            state = state + (sigmas[point + 1] - sigmas[point]) * array(record.guided)[point]
        np.testing.assert_array_equal(state, record.final)


def test_the_combination_is_rounded_once_and_branches_twice(kept: Kept) -> None:
    whole = records(kept("float32", GUIDED))[0]
    contract = dataclasses.replace(kept("float16", GUIDED).contract, latent_dtype="float16")
    packed = record_of(pack_records([whole], contract, NUMERICS), 0, contract)
    np.testing.assert_array_equal(packed.guided, array(whole.guided).astype(np.float16))
    ulp = 2.0**-11
    for mine, theirs in zip(records(kept("float16", GUIDED)), records(kept("float16", BOTH)), strict=True):
        w = np.array(contract.guidance)[mine.expert][:, None, None, None]
        sizes = w * np.abs(array(theirs.cond)) + (w - 1) * np.abs(array(theirs.uncond)) + np.abs(array(mine.guided))
        off = np.abs(array(mine.guided).astype(np.float64) - theirs.combination(contract))
        assert off.max() > 0 and (off <= 1.01 * ulp * sizes + 1e-6).all()


def array(field: Array | None) -> Array:
    assert field is not None
    return field


def test_it_takes_two_thirds_of_the_bytes_and_the_plan_knows(tmp_path: Path, kept: Kept, micro_wan: Path) -> None:
    resolved = resolve(micro_wan, "auto")
    for encoding, share in (("float32", 2 / 3), ("float16", 2 / 3), (INT8, (3 + 2 / 64) / (4 + 4 / 64))):
        configs = [told(tmp_path / branches, micro_wan, encoding, branches) for branches in (GUIDED, BOTH)]
        sizes = [forecast(config, facts_of(resolved), planned(config), tokens_of(resolved)) for config in configs]
        assert sizes[0].points / sizes[1].points == pytest.approx(share, abs=1e-3) and sizes[0].final == sizes[1].final
        big = [record_bytes(config, facts_of(resolved), 512, 512) for config in configs]
        assert big[0] < (share + 0.02) * big[1]
    points = [sum(size for receipt in kept("float16", branches).manifest().receipts
                  for name, (size, _) in receipt.files.items() if "/points/0" in name)
              for branches in (GUIDED, BOTH)]  # fmt: skip
    assert points[0] / points[1] == pytest.approx(2 / 3, abs=0.03)


def test_the_two_kinds_do_not_mix_and_their_difference_is_named(tmp_path: Path, kept: Kept, micro_wan: Path) -> None:
    alone, both = kept("float16", GUIDED), kept("float16", BOTH)
    with pytest.raises(Refused, match=r"branches: 'guided' \| 'both'"):
        merge([both, alone], tmp_path / "mixed")
    with pytest.raises(Refused, match=r"branches: 'guided' \| 'both'") as raised:
        harvest_here(told(alone.path, micro_wan, "float16", BOTH, samples=(PROMPT,)))
    assert raised.value.exit_code == 4
    difference = compare(alone, both)
    assert difference.contract == ("branches: 'guided' | 'both'",) and len(difference.altered) == 6
    assert ShardSet.open(alone.path / ASSETS / SAMPLES).contract.branches == GUIDED


def test_the_teacher_asked_again_gives_the_same_bytes(tmp_path: Path, kept: Kept, micro_wan: Path) -> None:
    whole = kept("float16", GUIDED)
    shutil.copytree(whole.path, tmp_path / "set")
    shutil.copy(whole.path.parent / "prompts.txt", tmp_path / "prompts.txt")
    config = told(tmp_path / "set", micro_wan, "float16", GUIDED, samples=(PROMPT,))
    (line,) = recompute(config, config.out, 1.0)
    assert line.startswith("6 records asked again came back bit for bit, 0 within")
    path = next((config.out / "shards").glob("*.zarr/points/0*"))
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    (damage,) = verify(ShardSet.open(config.out))
    assert "point 0 (latents/guided)" in str(damage)
    (line,) = repair(config, config.out)
    assert "as it was, byte for byte" in line and tree(config.out) == tree(whole.path)


def test_a_combination_that_is_not_finite_is_set_aside_with_its_step(kept: Kept) -> None:
    shards = kept("float32", GUIDED)
    good, sick = records(shards)[:2]
    broken = array(sick.guided).copy()
    broken[2, 0, 0, 0] = np.nan
    left, (fault,) = Health(shards, 1.0, Log("test", quiet=True)).sift([good, dataclasses.replace(sick, guided=broken)])
    assert left == [good] and fault["key"] == sick.key and fault["what"] == "not finite"
    assert fault["where"].startswith(f"guided[2] (t={sick.timesteps[2]:.1f}") and fault["step"] == "2 of 6"


def test_it_is_shown_as_what_it_is(kept: Kept) -> None:
    for branches, columns, said in ((GUIDED, ["latents", "guided"], True),
                                    (BOTH, ["latents", "cond", "uncond", "guidance"], False)):  # fmt: skip
        shards = kept("float16", branches)
        receipt = shards.manifest().receipts[0]
        shown = list(describe(shards.read(receipt).record(0), receipt, shards.contract))
        assert shown[3].split() == ["point", "t", "sigma", "expert", *columns]
        assert all(len(line.split()) == 4 + len(columns) for line in shown[4:10])
        assert any("guided predictions alone" in line for line in lines(survey(shards.path))) == said


def training(shards: ShardSet, init: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {"set": shards.path, "init": init, "out": out, "batch_size": 4, "global_batch": 8, "num_epochs": 2,
            "warmup_steps": 1, "log_every": 1, "threads": 1, "device": "cpu", "lr": 1e-3} | changes  # fmt: skip


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir) if "loss" in line]


@pytest.mark.parametrize("changes", [
    {}, {"guidance": [4.0, 3.0], "read_workers": 1, "fit": "auto"}, {"objective": "segment", "segments": 2},
], ids=str)  # fmt: skip
def test_a_student_learns_from_it_what_it_learns_from_both(
    tmp_path: Path, kept: Kept, micro_init: Path, changes: dict[str, Any]
) -> None:
    """To the bit where nothing is rounded; in half precision within what rounding moves."""
    alone, both = (trained_here(training(kept("float32", branches), micro_init, tmp_path / branches, **changes))
                   for branches in (GUIDED, BOTH))  # fmt: skip
    assert losses(alone) == losses(both) and len(losses(alone)) >= 3
    mine, theirs = (checkpoints(run)[-1] / MODEL_NAME for run in (alone, both))
    assert mine.read_bytes() == theirs.read_bytes()
    halves = [trained_here(training(kept("float16", branches), micro_init, tmp_path / f"half-{branches}", **changes))
              for branches in (GUIDED, BOTH)]  # fmt: skip
    np.testing.assert_allclose(losses(halves[0]), losses(halves[1]), rtol=1e-3)


@pytest.mark.parametrize("objective", ["output", "segment"])
def test_it_is_as_far_from_its_teacher_as_both_say(kept: Kept, micro_init: Path, objective: str) -> None:
    """Of points that are drawn and such that every record keeps."""
    student, gaps = load_student(micro_init).eval(), []
    for branches in (GUIDED, BOTH):
        shards = kept("float32", branches, keep=4, keep_at=(0, 3))
        values = training(shards, micro_init, shards.path, objective=objective)
        asked = objective_of(checked(TrainConfig, values, source="test"), shards.contract)
        held_out = HeldOut(asked, records(shards), text_rows=512, device=torch.device("cpu"))
        assert held_out.num_points == {"output": 24, "segment": 12}[objective]
        gaps.append(held_out.gap(student).numbers())
    assert gaps[0] == gaps[1]


@pytest.mark.parametrize("guidance", [[1.0, 1.0], {"low": 1.0, "high": 6.0}], ids=str)
def test_another_w_is_refused_with_the_reason(tmp_path: Path, kept: Kept, micro_init: Path, guidance: Any) -> None:
    with pytest.raises(Refused) as raised:
        trained_here(training(kept("float16", GUIDED), micro_init, tmp_path / "run", guidance=guidance))
    said = str(raised.value)
    assert raised.value.exit_code == 4 and "only the combination was kept" in said
    assert "branches: guided, at [4.0, 3.0]" in said and "guidance: null, or harvest with branches: both" in said


def test_it_is_checked_sampled_measured_and_exported(tmp_path: Path, kept: Kept, micro_init: Path) -> None:
    shards = kept("float16", GUIDED)
    values = training(shards, micro_init, tmp_path / "run", sample_prompts=[PROMPT], num_epochs=1)
    check(checked(TrainConfig, values, source="test"), World(rank=0, size=1, device=torch.device("cpu")))
    assert list((tmp_path / "run" / "check").rglob("*sample*.png"))
    run_dir = trained_here(values, save_samples=True)
    sample(run_dir, num=2, steps=2).save(tmp_path / "sheet.png")
    report = evaluate(run_dir, num=2, steps=2, grader=None)
    assert report["records"] == 2 and np.isfinite(report["psnr"])
    export(run_dir, tmp_path / "exported", form="wanlite")
    assert load_student(tmp_path / "exported").config == load_student(micro_init).config
    done = command("train", "plan", _written(tmp_path / "c.yaml", values))
    assert done.returncode == 0, done.stderr


def _written(path: Path, values: dict[str, Any]) -> Path:
    import yaml

    plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return path


@pytest.mark.parametrize("silent", ["cond", "uncond"])
def test_a_branch_that_says_nothing_makes_its_point_unusable(silent: str) -> None:
    """Nobody could see it later in what guidance made of it; where both are kept, health looks at each."""
    fields = {name: torch.randn(2, 4, 3, 3) for name in ("latents", "cond", "uncond", "guided")}
    fields[silent][1] = 0.5
    alone, both = (_chosen(made_contract(branches=branches), **fields) for branches in (GUIDED, BOTH))
    assert torch.equal(alone["guided"][0], fields["guided"][0]) and alone["guided"][1].isnan().all()
    assert all(both[name] is fields[name] for name in ("latents", "cond", "uncond"))
