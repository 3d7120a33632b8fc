"""What would have cost a day of a running harvest: work done twice, GPUs that burn for nothing, a wait for ever."""

import json
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from common.errors import Partial, Stopped
from common.files import sweep, write_atomic
from common.log import LOG_NAME, Log
from common.manifest import Receipt
from common.shards import RUNS, ShardSet
from common.watch import HEARTBEAT_NAME, Watch
from harvest.__main__ import main
from harvest.granary.carry import carry
from harvest.granary.place import LocalPlace
from harvest.granary.repair import repair
from harvest.running.agenda import Leases, agenda
from harvest.running.events import tell
from harvest.running.slices import WHOLE
from harvest.running.task import read_task, run_dir
from harvest.running.workers import MAX_FAULTS, Place, _ended, _judge, supervise
from harvest.running.writer import Writer
from harvest.teachers.wan import WanTeacher
from tests.common.test_files import FailingAt
from tests.made import PROMPTS, command, harvest_config, harvest_here, planned, tree


def copied(micro_set: Path, out: Path) -> ShardSet:
    shutil.copytree(micro_set, out)
    return ShardSet.open(out)


def test_what_was_carried_elsewhere_meanwhile_is_not_walked_again(
    tmp_path: Path, micro_wan: Path, micro_set: Path
) -> None:
    """Another host holds an item, commits it and frees it, while ours has it on its list of what others hold."""
    config = harvest_config(tmp_path / "set", micro_wan)
    shards, plan = copied(micro_set, config.out), planned(config)
    first, second = (shards.receipt_path(item.id) for item in plan.items[:2])
    receipt = second.read_bytes()
    first.unlink()
    second.unlink()
    theirs = config.out / RUNS / "leases" / f"{plan.items[1].id}.json"
    write_atomic(theirs, json.dumps({"host": "elsewhere", "pid": 1}).encode())
    with Leases(config.out) as leases:
        left = agenda(plan, shards, WHOLE, leases, lambda: None, time.sleep)
        assert next(left) == plan.items[0]
        second.write_bytes(receipt)
        assert len(list(carry(LocalPlace(config.out), LocalPlace(tmp_path / "far"), free=True))) == 5
        assert not second.exists()
        theirs.unlink()
        assert list(left) == []


@pytest.mark.parametrize("num_added", [0, 4])
def test_a_worker_that_dies_slowly_is_retired_unless_it_gets_on(
    tmp_path: Path, micro_wan: Path, monkeypatch: pytest.MonkeyPatch, num_added: int
) -> None:
    """A hang is seen after twice deadline_s, which may be an hour: no time between two faults forgives them."""
    config = harvest_config(tmp_path / "set", micro_wan)
    place = Place(part=WHOLE, gpu=None, sharers=1)
    for fault in range(MAX_FAULTS):
        assert place.is_wanted
        place.process = subprocess.Popen(["sh", "-c", "kill -9 $$"])
        place.process.wait()
        beat = {"state": "running", "stage": "denoise", "host": "here", "pid": place.process.pid,
                "started": time.time(), "time": time.time(), "added": num_added}  # fmt: skip
        write_atomic(run_dir(config, place.process.pid) / HEARTBEAT_NAME, json.dumps(beat).encode())
        monkeypatch.setattr("harvest.running.workers.time.monotonic", lambda hour=fault: 4000.0 * hour)
        _ended(place, [place], config, Log("test", quiet=True))
    assert place.retired == (num_added == 0)


@pytest.mark.parametrize("was_committed", [True, False])
def test_half_a_shard_under_its_final_name_is_written_again(
    tmp_path: Path, micro_wan: Path, micro_set: Path, was_committed: bool
) -> None:
    """Torn by the disk; or all that a copy that was killed has brought so far. By law it does not exist."""
    shards, config = copied(micro_set, tmp_path / "set"), harvest_config(tmp_path / "set", micro_wan)
    receipt = shards.manifest().receipts[2]
    part = receipt.paths(shards.shards_dir)[".zarr/final/0.0.0.0"]
    part.write_bytes(part.read_bytes()[:100])
    if not was_committed:
        part.unlink()
        shards.receipt_path(receipt.item).unlink()
    harvest_here(config)
    assert sweep(shards.shards_dir, older_than_s=-1) == 1
    assert tree(config.out) == tree(micro_set)


def test_after_a_repair_that_was_killed_the_item_is_walked_again(
    tmp_path: Path, micro_wan: Path, micro_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the receipt and the last of the old bytes."""
    shards, config = copied(micro_set, tmp_path / "set"), harvest_config(tmp_path / "set", micro_wan)
    receipt = shards.manifest().receipts[2]
    part = receipt.paths(shards.shards_dir)[".zarr/final/0.0.0.0"]
    part.write_bytes(part.read_bytes()[::-1])

    def killed(where: ShardSet, old: Receipt) -> None:
        (where.shards_dir / f"{old.stem}.zarr" / "zarr.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("harvest.granary.repair._remove", killed)
        with pytest.raises(KeyboardInterrupt):
            list(repair(config, config.out))
    assert shards.manifest().num_records == 20
    harvest_here(config)
    assert sweep(shards.shards_dir, older_than_s=-1) == 1
    assert tree(config.out) == tree(micro_set)


def test_where_others_hold_what_is_left_the_first_to_finish_is_no_failure(
    tmp_path: Path, micro_wan: Path, micro_set: Path
) -> None:
    told = tmp_path / "told"
    config = harvest_config(tmp_path / "set", micro_wan, on_event=f"echo $HARVEST_EVENT >> {told}")
    shards = copied(micro_set, config.out)
    receipt = shards.receipt_path(planned(config).items[0].id)
    data = receipt.read_bytes()
    receipt.unlink()
    task, places = read_task(config), [Place(part=WHOLE, gpu=None, sharers=1, code=0, done=True)]
    _judge(places, task, Log("test", quiet=True))
    assert not told.exists()  # it is not done
    receipt.write_bytes(data)
    _judge(places, task, Log("test", quiet=True))
    assert told.read_text() == "done\n"
    receipt.unlink()
    places[0].retired, places[0].code = True, 1
    with pytest.raises(Partial, match="every worker was retired"):
        _judge(places, task, Log("test", quiet=True))


def test_an_event_that_cannot_be_told_harms_nothing(tmp_path: Path) -> None:
    """A command line beyond what the system takes: no process is begun at all."""
    tell("true " + "x" * 200_000, "done", {}, Log("test", tmp_path, quiet=True))
    assert "on_event done: " in (tmp_path / LOG_NAME).read_text()


@pytest.mark.parametrize("way", ["put", "wait", "leave"])
def test_whoever_waits_for_the_disk_has_a_deadline(tmp_path: Path, way: str) -> None:
    """Also for the last item, and after an error."""
    log = Log("test", tmp_path, quiet=True)
    with (
        Watch(tmp_path, log, interval_s=0.02) as watch,
        Writer(time.sleep, partial(watch.stage, "write", deadline_s=0.05)) as writer,
    ):
        writer.put(0.3)
        if way != "leave":
            writer.put(0.0) if way == "put" else writer.wait()
    assert "STALLED in 'write'" in (tmp_path / LOG_NAME).read_text()


def test_a_wish_to_stop_is_heard_between_two_prompts(
    tmp_path: Path, micro_wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder on the CPU takes hours for an item of many."""
    asked, real = [], WanTeacher.encode

    def encode(teacher: WanTeacher, prompts: list[str]) -> list[Tensor]:
        if prompts[0] in PROMPTS:
            asked.extend(prompts)
            signal.raise_signal(signal.SIGTERM)
        return real(teacher, prompts)

    monkeypatch.setattr(WanTeacher, "encode", encode)
    with pytest.raises(Stopped, match="SIGTERM"):
        harvest_here(harvest_config(tmp_path / "set", micro_wan, records_per_shard=24))
    assert len(asked) == 1


def test_a_worker_started_again_does_not_work_on_edited_prompts(
    tmp_path: Path, micro_wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line in the middle of the file gives all items after it other names: two would walk the same records."""
    config, said, real = harvest_config(tmp_path / "set", micro_wan, workers=2), [], subprocess.Popen

    def begun(words: list[str], **options: Any) -> subprocess.Popen[bytes]:
        said.append(words)
        return real(["true"], **options)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", begun)
        supervise(config, WHOLE, 2, strict=False, limit_s=None)
    digests = [words[words.index("--planned") + 1] for words in said]
    assert digests == [read_task(config).digest] * 2
    assert config.prompts is not None
    config.prompts.file.write_text("\n".join([*PROMPTS[:2], "a sea of circles", *PROMPTS[2:]]), encoding="utf-8")
    done = command("harvest", "run", *said[1][4:-2])  # as it was begun, but for its parent
    assert done.returncode == 4 and "changed while the run was on" in done.stderr
    assert not list(config.out.glob("receipts/*"))


def test_a_full_disk_is_no_traceback_outside_a_run_either(
    tmp_path: Path, micro_set: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = copied(micro_set, tmp_path / "set")
    shards.receipt_path(shards.manifest().receipts[0].item).unlink()
    before = tree(shards.path)
    FailingAt(1, monkeypatch, torn=True)
    with pytest.raises(SystemExit) as caught:
        main(["rebuild", str(shards.path)])
    said = capsys.readouterr().err
    assert caught.value.code == 3 and said.startswith("harvest: no space left; found: ") and said.count("\n") == 1
    assert tree(shards.path) == before
