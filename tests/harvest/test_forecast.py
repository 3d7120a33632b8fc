"""What `plan` says is what a run then does: bytes, hours, and what does not fit."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.errors import BadUsage, Refused
from common.shards import RUNS, ShardSet
from harvest.config import HarvestConfig
from harvest.doctor import examine
from harvest.forecast import crowded, forecast
from harvest.loading.folder import resolve
from harvest.plan_report import Means, answers_of, report, tokens_of
from harvest.running.task import read_task
from harvest.teachers import facts_of, placement_of
from tests.harvest.test_resume import as_file
from tests.made import PROMPTS, command, harvest_config, harvest_here, planned

CASES: list[dict[str, Any]] = [
    {"container": "zarr"},
    {"container": "tar"},
    {"container": "zarr", "encoding": "int8-block64", "keep": 5},
    {"container": "tar", "encoding": "int8-block64", "records_per_shard": 24},
    {"container": "zarr", "encoding": "float32", "height": 96, "source": "renoise"},
    {"container": "tar", "encoding": "float32", "records_per_shard": 7},
    {"container": "zarr", "branches": "guided"},
    {"container": "tar", "branches": "guided", "encoding": "int8-block64", "keep": 5},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_predicted_bytes_are_those_that_are_written(tmp_path: Path, micro_wan: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "a light house on a red sea " * 9, "日本の庭"]), "utf-8")
    config = harvest_config(tmp_path / "set", micro_wan, **changes)
    resolved = resolve(micro_wan, "auto")
    told = forecast(config, facts_of(resolved), planned(config), tokens_of(resolved))
    out = harvest_here(config)
    receipts = sum(path.stat().st_size for path in (out / "receipts").iterdir())
    written = ShardSet.open(out).manifest().num_bytes + receipts
    assert abs(told.total - written) <= 0.01 * written, (told, written)


FOLDERS_OWN = {"solver": "checkpoint", "jitter": False}


@pytest.mark.parametrize("changes", [
    {}, {"source": "renoise"}, FOLDERS_OWN, {**FOLDERS_OWN, "source": "renoise"},
    {**FOLDERS_OWN, "shift": 12.0, "steps": 9, "samples": ("a red cat", "a sea", "a star", "the sky")},
], ids=str)  # fmt: skip
def test_predicted_forwards_are_those_that_a_run_takes(
    tmp_path: Path, micro_wan: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """By expert: schedulers disagree about which steps are high-noise."""
    from harvest.teachers import wan

    monkeypatch.setattr(wan, "doubts", lambda *_: "")
    asked, real = [0, 0], wan.WanTeacher.predict_with

    def predict_with(teacher: Any, number: int, *others: Any) -> Any:
        asked[number] += 1
        return real(teacher, number, *others)

    monkeypatch.setattr(wan.WanTeacher, "predict_with", predict_with)
    config = harvest_config(tmp_path / "set", micro_wan, keep=5, records_per_shard=7, **changes)
    answers = answers_of(read_task(config))
    (metrics,) = (harvest_here(config) / RUNS).glob("*/metrics.jsonl")
    last = json.loads(metrics.read_text().splitlines()[-1])
    samples = -(-len(config.samples) // config.micro_batch) * config.steps
    assert last["records"] == 24 and last["forwards"] + samples == sum(answers)
    assert asked == list(answers)


def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path, micro_wan: Path) -> None:
    """12 items of 4 records are two micro-batches each: 6 x 2 x 6 answers of two seconds are 144 s."""
    config = harvest_config(tmp_path / "set", micro_wan)
    lines = list(report(config, Means(seconds_per_forward=2.0, gpus=2)))
    assert "time      0.02 h on 2 GPUs, 0.04 GPU-hours" in lines
    assert "a kill    loses at most 2 shards of each worker, 8 records, 48.0s of work" in lines
    assert any("records_per_shard: 1 " in line for line in report(config, Means(seconds_per_forward=150.0)))
    with pytest.raises(Refused, match=r"0\.04 h of 0\.02 h; do: prompts\.limit: 6") as caught:
        list(report(config, Means(seconds_per_forward=2.0, hours=0.02)))
    assert caught.value.exit_code == 4
    fewer = config.model_copy(update={"prompts": config.prompts.model_copy(update={"limit": 6})})  # type: ignore[union-attr]
    assert any("the time allows" in line for line in report(fewer, Means(seconds_per_forward=2.0, hours=0.021)))
    with pytest.raises(Refused, match=r"kB of 100\.0 kB"):
        list(report(config, Means(disk=100_000)))
    limit = _first_proposal(config, Means(disk=400_000))
    assert limit < 12
    for prompts, fits in ((limit, True), (limit + 2, False)):
        less = config.model_copy(update={"prompts": config.prompts.model_copy(update={"limit": prompts})})  # type: ignore[union-attr]
        assert (forecast(less, *_facts_and_plan(less)).total <= 400_000) == fits


def _first_proposal(config: HarvestConfig, means: Means) -> int:
    told = []
    with pytest.raises(Refused):
        for line in report(config, means):
            told.append(line)
    first = next(line for line in told if line.startswith("fits"))
    return int(re.findall(r"\d+", first)[0])


def _facts_and_plan(config: HarvestConfig) -> Any:
    task = read_task(config)
    return task.facts, task.plan, tokens_of(task.resolved)


def test_the_probe_asks_the_real_teacher_and_leaves_nothing(tmp_path: Path, micro_wan: Path) -> None:
    path = as_file(harvest_config(tmp_path / "deep" / "set", micro_wan), tmp_path / "c.yaml")
    done = command("harvest", "plan", path, "--probe", "--hours", "1h", "--disk", "3T")
    assert done.returncode == 2 and "--hours" in done.stderr
    done = command("harvest", "plan", path, "--probe", "--hours", "5", "--disk", "3T")
    assert done.returncode == 0, done.stderr
    first, second = map(float, re.search(r"pace +([\d.e-]+) s, ([\d.e-]+) s an answer", done.stdout).groups())  # type: ignore
    assert 0 < first < 5 and 0 < second < 5 and "probed in" in done.stderr
    assert "as many as the time allows" in done.stdout and "GPU-hours" in done.stdout
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["prompts.txt"]
    with pytest.raises(BadUsage, match="keep"):
        harvest_config(tmp_path / "set", micro_wan, keep=7)


def test_the_doctor_says_what_is_fit_and_what_is_not(tmp_path: Path, micro_wan: Path) -> None:
    config = harvest_config(tmp_path / "set", micro_wan)
    told = list(examine(config))
    for start in (
        "releases  torch ",
        "cpu ",
        "disk ",
        "writing ",
        "locks     kept",
        "teacher   text_encoder",
        "placement cpu",
    ):
        assert any(line.startswith(start) for line in told), start
    assert not list(tmp_path.glob(".tmp*"))
    nowhere = config.model_copy(update={"teacher": config.teacher.model_copy(update={"folder": tmp_path / "none"})})
    with pytest.raises(Refused, match="1 things stand in the way; found: there is no teacher"):
        list(examine(nowhere))


def told(config: HarvestConfig, means: Means, start: str) -> list[str]:
    return [line for line in report(config, means) if line.startswith(start)]


def test_what_the_set_holds_is_not_planned_again(tmp_path: Path, micro_wan: Path) -> None:
    """Neither its hours nor its bytes; and the bytes of other prompts are nobody's progress."""
    config, means = harvest_config(tmp_path / "set", micro_wan), Means(seconds_per_forward=2.0, hours=0.02)
    harvest_here(config)
    assert config.prompts is not None
    held = ShardSet.open(config.out).manifest().num_bytes
    assert told(config, means, "time ") == ["time      0 h on 1 GPUs, 0 GPU-hours"]
    assert told(config, Means(disk=1), "to do ")[0].startswith("to do     0 of them")
    config.prompts.file.write_text("\n".join([*PROMPTS, "a tree", "a star"]), encoding="utf-8")
    assert told(config, means, "to do ")[0].startswith("to do     4 of them, in 1 shards")
    assert told(config, means, "time ") == ["time      0.00667 h on 1 GPUs, 0.00667 GPU-hours"]  # 2 x 6 answers
    config.prompts.file.write_text("\n".join(f"{prompt} at night" for prompt in PROMPTS), encoding="utf-8")
    with pytest.raises(Refused, match=r"\d+\.\d kB of "):
        list(report(config, Means(disk=held // 2)))


def test_sizes_that_prompts_bring_count_for_hours_and_placement(
    tmp_path: Path, micro_wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward of four times the pixels takes four times as long; the largest one must fit."""
    asked, real = [], placement_of

    def counted(config: Any, resolved: Any, work: Any) -> Any:
        asked.append((work.height, work.width))
        return real(config, resolved, work)

    monkeypatch.setattr("harvest.plan_report.placement_of", counted)
    rows = tmp_path / "rows.jsonl"
    hours = []
    for size, said in ((64, False), (128, True)):
        rows.write_text("\n".join(json.dumps({"prompt": p, "width": size, "height": size}) for p in PROMPTS))
        config = harvest_config(tmp_path / "set", micro_wan, prompts={"file": rows})
        lines = list(report(config, Means(seconds_per_forward=2.0, hours=100)))
        hours.append(float(next(line for line in lines if line.startswith("time")).split()[1]))
        assert any("at 64x64" in line and line.endswith("; other sizes by their area") == said for line in lines)
        assert any("their own sizes" in line for line in lines if line.startswith("fits")) == said
    assert hours[1] == pytest.approx(4 * hours[0], rel=0.01) and asked == [(64, 64), (128, 128)]


def test_texts_that_outweigh_their_shard_are_told_with_what_would_help(
    tmp_path: Path, micro_wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `plan` and by the run; short ones are not worth a word. Packed as it was, a set goes on as it began."""
    config = harvest_config(tmp_path / "set", micro_wan, records_per_shard=24)
    facts, plan, count_tokens = _facts_and_plan(config)
    assert list(crowded(config, facts, plan.items, count_tokens)) == []
    (length,) = count_tokens(PROMPTS[:1])
    assert told(config, Means(), "text ") == []
    monkeypatch.setattr("harvest.forecast.SHARD_BYTES", 12 * length * facts.text_dim)
    (line,) = told(config, Means(), "text ")
    fewer = int(re.findall(r"records_per_shard: (\d+)", line)[0])
    assert fewer < 24 and " in a shard of 24 records" in line
    out = harvest_here(config)
    (log,) = (out / RUNS).glob("*/log.txt")
    assert "texts: " in log.read_text() and f"records_per_shard: {fewer} " in log.read_text()
    assert [receipt.num_records for receipt in ShardSet.open(out).manifest().receipts] == [24]


def test_plan_and_doctor_refuse_what_a_run_would_refuse(tmp_path: Path, micro_wan: Path) -> None:
    config = harvest_config(tmp_path / "set", micro_wan, prompts={"limit": 1})
    harvest_here(config)
    other = config.model_copy(update={"guidance": (5.0, 5.0)})
    for lines in (report(other, Means()), examine(other)):
        with pytest.raises(Refused, match=r"guidance: \(4\.0, 3\.0\) \| \(5\.0, 5\.0\)"):
            list(lines)
