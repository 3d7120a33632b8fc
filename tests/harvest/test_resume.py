"""Killed, appended, refused: the set is the same in the end, or nothing was done."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from common.shards import RUNS, ShardSet
from harvest.config import HarvestConfig
from harvest.quarantine import notes_of
from tests.made import PROMPTS, command, harvest_config, harvest_here, planned, started, tree


def as_file(config: HarvestConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    return path


def wait_for_receipts(out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list((out / "receipts").glob("[!.]*.json"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_and_run_again_is_byte_identical(tmp_path: Path, micro_wan: Path, micro_set: Path) -> None:
    config = as_file(harvest_config(tmp_path / "set", micro_wan), tmp_path / "c.yaml")
    process = started("harvest", "run", config)
    wait_for_receipts(tmp_path / "set", 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= ShardSet.open(tmp_path / "set").manifest().num_records // 4 < 6
    assert "dead(in" in command("harvest", "status", tmp_path / "set").stdout
    again = command("harvest", "run", config)
    assert again.returncode == 0, again.stderr
    assert tree(tmp_path / "set") == tree(micro_set)


def test_asked_to_stop_it_keeps_what_is_whole_and_says_75(tmp_path: Path, micro_wan: Path, micro_set: Path) -> None:
    config = as_file(harvest_config(tmp_path / "set", micro_wan), tmp_path / "c.yaml")
    process = started("harvest", "run", config)
    wait_for_receipts(tmp_path / "set", 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert "stopped" in command("harvest", "status", tmp_path / "set").stdout
    assert command("harvest", "run", config).returncode == 0
    assert tree(tmp_path / "set") == tree(micro_set)


def test_a_finished_set_is_left_alone_and_loads_no_model(
    micro_config: HarvestConfig, micro_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harvest.running import loop

    before = tree(micro_set, without=())
    monkeypatch.setattr(loop, "load_teacher", None)  # calling it would fail
    harvest_here(micro_config)
    assert tree(micro_set, without=()) == before


def test_appended_prompts_mean_only_new_work(tmp_path: Path, micro_wan: Path) -> None:
    config = harvest_config(tmp_path / "set", micro_wan, prompts={"seeds_per_prompt": 1}, records_per_shard=5)
    config.prompts.file.write_text("\n".join(PROMPTS[:7]), encoding="utf-8")
    first = {receipt.item for receipt in ShardSet.open(harvest_here(config)).manifest().receipts}
    config.prompts.file.write_text("\n".join(PROMPTS), encoding="utf-8")
    shards = ShardSet.open(tmp_path / "set")
    left = list(planned(config).remaining(shards))
    assert sorted(question.prompt for item in left for question in item.questions) == sorted(PROMPTS[7:])
    manifest = ShardSet.open(harvest_here(config)).manifest()
    assert first < {receipt.item for receipt in manifest.receipts}
    keys = [key for receipt in manifest.receipts for key in shards.read(receipt).header.keys]
    assert len(keys) == len(set(keys)) == len(PROMPTS)
    assert list(planned(config).remaining(shards)) == []


def test_another_meaning_is_refused_with_the_field(tmp_path: Path, micro_wan: Path, micro_set: Path) -> None:
    config = harvest_config(
        micro_set, micro_wan, guidance=(5.0, 3.0), prompts={"file": micro_set.parent / "prompts.txt"}
    )
    before = tree(micro_set)
    done = command("harvest", "run", as_file(config, tmp_path / "c.yaml"))
    assert done.returncode == 4 and "guidance: (4.0, 3.0) | (5.0, 3.0)" in done.stderr
    assert "Traceback" not in done.stderr and tree(micro_set) == before


def test_other_numerics_are_said_and_refused_only_with_strict(tmp_path: Path, micro_wan: Path, micro_set: Path) -> None:
    import shutil

    from common.errors import Refused
    from harvest.running.loop import harvest

    shutil.copytree(micro_set, tmp_path / "set")
    lost = sorted((tmp_path / "set" / "receipts").iterdir())[0]
    lost.unlink()
    config = harvest_config(tmp_path / "set", micro_wan, micro_batch=2)
    with pytest.raises(Refused, match=r"micro_batch: 2 \| 3"):
        harvest(config, strict=True)
    assert not lost.exists()
    harvest(config)
    logs = [path.read_text() for path in (tmp_path / "set" / RUNS).glob("*/log.txt")]
    assert any("other numerics (this run | those): micro_batch: 2 | 3" in log for log in logs)
    assert len({receipt.numerics for receipt in ShardSet.open(tmp_path / "set").manifest().receipts}) == 2


def test_a_record_that_is_not_finite_is_set_aside(tmp_path: Path, micro_wan: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    from common.errors import Partial

    broken = tmp_path / "teacher"
    shutil.copytree(micro_wan, broken)
    weights_path = next((broken / "transformer_2").glob("*.safetensors"))
    weights = load_file(weights_path)
    weights["proj_out.bias"][3] = 1e38  # finite, so it loads; what it computes is not
    save_file(weights, weights_path, metadata={"format": "pt"})
    config = harvest_config(tmp_path / "set", broken, prompts={"limit": 2})
    with pytest.raises(Partial, match="4 records were set aside"):
        harvest_here(config)
    (note,) = notes_of(tmp_path / "set")
    assert len(note.faults) == 4 and all("expert 1" in fault["where"] for fault in note.faults)
    shards = ShardSet.open(tmp_path / "set")
    assert shards.manifest().num_records == 0 and list(planned(config).remaining(shards)) == []


@pytest.mark.parametrize(("changes", "what"), [
    ({"height": 72}, "take 64 or 80"),
    ({"keep": 9}, "keep"),
    ({"teacher": {"folder": "nowhere"}}, "nowhere"),
    ({"teacher": {"variant": "fp16"}}, "no fp16 safetensors"),
    ({"guidance": (3.0,)}, "2 experts"),
    ({"latent_dtype": "float32"}, "encoding: float32"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_2(
    tmp_path: Path, micro_config: HarvestConfig, changes: dict, what: str
) -> None:
    values = micro_config.model_dump(mode="json") | {"out": str(tmp_path / "set")}
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values, sort_keys=False).replace("!!python/tuple", ""))
    done = command("harvest", "run", tmp_path / "c.yaml")
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and what in line and "do: " in line
    assert "Traceback" not in done.stderr


def test_a_heartbeat_stands_before_a_model_byte_is_read(tmp_path: Path, micro_wan: Path) -> None:
    """The weight file blocks (a pipe that nobody writes): status must still name the stage."""
    import shutil

    slow = tmp_path / "teacher"
    shutil.copytree(micro_wan, slow)
    told = tmp_path / "told"
    on_event = f'echo "$HARVEST_EVENT $HARVEST_FACTS" >> {told}'
    config = as_file(harvest_config(tmp_path / "set", slow, deadline_s=1, on_event=on_event), tmp_path / "c.yaml")
    (slow / "text_encoder" / "model.safetensors").unlink()
    os.mkfifo(slow / "text_encoder" / "model.safetensors")
    process = started("harvest", "run", config)
    try:
        deadline = time.monotonic() + 30
        while not list((tmp_path / "set" / RUNS).glob("*/heartbeat.json")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        (beat,) = (tmp_path / "set" / RUNS).glob("*/heartbeat.json")
        while json.loads(beat.read_bytes()).get("loading") != "text_encoder":
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        assert json.loads(beat.read_bytes())["state"] in ("starting(load)", "stalled(load)")
        assert {"metrics.jsonl", "run.json", "config.yaml", "log.txt"} <= {path.name for path in beat.parent.iterdir()}
        while not told.exists() or not told.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert told.read_text().startswith('stall {"stage": "load"')
        assert "stalled(load)" in command("harvest", "status", tmp_path / "set").stdout
    finally:
        process.kill()
        process.wait()
