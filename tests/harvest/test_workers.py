"""Many workers or one, killed or not, in any order: the same records; and nobody is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import BadUsage, Refused, Stopped
from common.log import Log
from common.record import item_id
from common.shards import RUNS, ShardSet
from harvest.granary.select import take
from harvest.quarantine import Note
from harvest.running.agenda import Leases, _free
from harvest.running.crew import placed_workers_asked_apart, share_out
from harvest.running.loop import harvest
from harvest.running.slices import WHOLE, Slice, is_launched, parse_slice, see_own_gpu, slice_of
from harvest.running.workers import Place, _ended
from harvest.status import lines, survey
from tests.harvest.test_resume import as_file
from tests.made import ROOT, command, harvest_config, planned, started, tree


def until(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def worker_at_work(out: Path, share: str) -> int | None:
    """Of a living one that has begun to denoise."""
    for path in (out / RUNS).glob("*/heartbeat.json"):
        beat = json.loads(path.read_bytes())
        if beat.get("slice") == share and beat["state"] == "running" and Path(f"/proc/{beat['pid']}").exists():
            return int(beat["pid"])
    return None


def test_two_workers_of_which_one_is_killed_equal_one(tmp_path: Path, micro_wan: Path, micro_set: Path) -> None:
    told = tmp_path / "told"
    on_event = f'echo "$HARVEST_EVENT $HARVEST_FACTS" >> {told}'
    config = harvest_config(tmp_path / "set", micro_wan, workers=2, on_event=on_event)
    supervisor = started("harvest", "run", as_file(config, tmp_path / "c.yaml"))
    until(lambda: worker_at_work(config.out, "1/2"))
    os.kill(worker_at_work(config.out, "1/2") or 0, signal.SIGKILL)
    assert supervisor.wait(timeout=100) == 0
    assert tree(config.out) == tree(micro_set)
    logs = "\n".join(path.read_text() for path in (config.out / RUNS).glob("*/log.txt"))
    assert "worker 1/2 ended by SIGKILL: started again in 1 s" in logs
    assert told.read_text().startswith("done {")
    assert not list((config.out / RUNS / "leases").iterdir())


def test_asked_to_stop_all_workers_stop_and_say_75(tmp_path: Path, micro_wan: Path) -> None:
    """And while they work, the same slice is refused to others, with its holder."""
    config = harvest_config(tmp_path / "set", micro_wan, workers=2, steps=300, keep=2)
    supervisor = started("harvest", "run", as_file(config, tmp_path / "c.yaml"))
    try:
        until(lambda: worker_at_work(config.out, "0/2"))
        with pytest.raises(Refused, match=f"process {worker_at_work(config.out, '0/2')} on "):
            harvest(config, part=Slice(rank=0, size=2))
        workers = children(supervisor.pid)
        supervisor.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert supervisor.wait(timeout=40) == 75 and time.monotonic() - began < 25
        assert len(workers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in workers)
    finally:
        supervisor.kill()
        supervisor.wait()


def test_the_workers_end_with_a_supervisor_that_is_killed(tmp_path: Path, micro_wan: Path) -> None:
    """By SIGKILL, while they start: they see at once that nobody watches over them."""
    config = harvest_config(tmp_path / "set", micro_wan, workers=2)
    supervisor = started("harvest", "run", as_file(config, tmp_path / "c.yaml"))
    until(lambda: len(children(supervisor.pid)) == 2)
    workers = children(supervisor.pid)
    supervisor.kill()
    supervisor.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 20)
    assert not list(config.out.glob("shards/*"))


def test_a_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """In the middle of its work, and whatever it ignores (nohup)."""
    child = "import os, signal, time; from harvest.running.workers import die_with; signal.signal(signal.SIGHUP, " \
            "signal.SIG_IGN); die_with(os.getppid()); print(os.getpid(), flush=True); time.sleep(60)"  # fmt: skip
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    until(lambda: not Path(f"/proc/{pid}").exists(), 5)
    process.stdout.close()


def test_a_worker_that_hangs_is_killed_and_started_again(tmp_path: Path, micro_wan: Path, micro_set: Path) -> None:
    """Stopped by a signal that it cannot see: no heartbeat, no end of its own."""
    config = harvest_config(tmp_path / "set", micro_wan, workers=2, deadline_s=6)
    supervisor = started("harvest", "run", as_file(config, tmp_path / "c.yaml"))
    until(lambda: worker_at_work(config.out, "1/2"))
    os.kill(worker_at_work(config.out, "1/2") or 0, signal.SIGSTOP)
    assert supervisor.wait(timeout=100) == 0
    assert tree(config.out) == tree(micro_set)
    logs = "\n".join(path.read_text() for path in (config.out / RUNS).glob("*/log.txt"))
    assert "worker 1/2 hangs in" in logs and "worker 1/2 ended by SIGKILL" in logs


def test_a_place_where_workers_cannot_work_is_retired_and_said(tmp_path: Path, micro_wan: Path) -> None:
    """The weights' folder loses a file after the plan: every worker is refused, nobody tries for ever."""
    broken = tmp_path / "teacher"
    shutil.copytree(micro_wan, broken)
    weights = next((broken / "transformer_2").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    told = tmp_path / "told"
    config = harvest_config(tmp_path / "set", broken, workers=2, on_event=f"echo $HARVEST_EVENT >> {told}")
    done = command("harvest", "run", as_file(config, tmp_path / "c.yaml"))
    assert done.returncode in (2, 4, 5) and "every worker was retired" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and told.read_text().split() == ["retired", "retired"]


def test_a_worker_that_is_done_helps_with_the_rest(tmp_path: Path, micro_wan: Path, micro_set: Path) -> None:
    """Slice 2 of 3 alone does everything; an item that somebody alive holds is left to him."""
    config = harvest_config(tmp_path / "set", micro_wan)
    held = planned(config).items[0]
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        leases = Leases(config.out)
        leases._me["pid"] = sleeper.pid
        assert leases.take(held.id)
        assert harvest(config, part=Slice(rank=2, size=3)) == 20
    finally:
        sleeper.kill()
        sleeper.wait()
    assert harvest(config, part=Slice(rank=2, size=3)) == 4
    assert tree(config.out) == tree(micro_set)


def test_an_item_whose_good_records_are_committed_is_not_walked_again(
    tmp_path: Path, micro_wan: Path, micro_set: Path
) -> None:
    """By somebody whose list of what remains is from before; and its lease is swept."""
    config = harvest_config(tmp_path / "set", micro_wan)
    shutil.copytree(micro_set, config.out)
    shards = ShardSet.open(config.out)
    item = planned(config).items[0]
    keys = [question.key for question in item.questions]
    receipt = shards.receipt_path(item.id)
    good = shards.receipt_path(item_id(keys[1:]))
    fault = {"key": keys[0], "what": "not finite", "where": "cond[0]"}
    leases = Leases(config.out)
    whole = shards.manifest().by_item[item.id]
    packed = shards.read(whole).packed()
    receipt.unlink()
    Note(item=item.id, walked=keys, shard=item_id(keys[1:]), faults=[fault]).write(config.out)
    assert list(_free([item], shards, leases)) == [item] and not good.exists()
    shards.commit_packed(take(packed, [1, 2, 3], shards.contract), "zarr")
    assert list(_free([item], shards, leases)) == []
    leases.sweep(shards)
    assert not list((config.out / RUNS / "leases").iterdir())
    for faults, left in [([fault], [item]), ([fault | {"key": key} for key in keys], []), ([], [item])]:
        # None was good: what all are set aside for stays so, what was mended and then lost is walked again.
        Note(item=item.id, walked=keys, shard=None, faults=faults).write(config.out)
        assert list(_free([item], shards, leases)) == left


def test_the_lease_of_one_killed_after_his_commit_is_swept(tmp_path: Path, micro_wan: Path, micro_set: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(micro_set, out)
    config = harvest_config(out, micro_wan)
    first, second, *_ = planned(config).items
    for item in (first, second):
        assert Leases(out).take(item.id)
    ShardSet.open(out).receipt_path(second.id).unlink()
    Leases(out).sweep(ShardSet.open(out))
    assert [path.stem for path in (out / RUNS / "leases").iterdir()] == [second.id]
    for _ in range(2):  # one works the second item, one finds nothing left
        harvest(config)
        assert not list((out / RUNS / "leases").iterdir())
        assert Leases(out).take(first.id)


def test_a_time_limit_stops_like_a_signal(tmp_path: Path, micro_wan: Path) -> None:
    with pytest.raises(Stopped, match=r"time limit of 0\.0s") as caught:
        harvest(harvest_config(tmp_path / "set", micro_wan), limit_s=0.0)
    assert caught.value.exit_code == 75


def test_a_place_that_faults_three_times_is_retired_and_the_others_do_its_work(tmp_path: Path, micro_wan: Path) -> None:
    config = harvest_config(tmp_path / "set", micro_wan)
    places = [Place(part=part, gpu=None, sharers=1) for part in WHOLE.split(2)]
    places[1].done = True
    for fault in (1, 2, 3):
        assert places[0].is_wanted
        places[0].process = subprocess.Popen(["sh", "-c", "kill -9 $$"])
        places[0].process.wait()
        began = time.monotonic()
        _ended(places[0], places, config, Log("test", quiet=True))
        assert places[0].process is None and (fault == 3 or places[0].start_at - began >= 2 ** (fault - 1))
    assert places[0].retired and places[1].is_wanted


def test_gpus_are_shared_out_to_workers() -> None:
    assert share_out([], 2) == [None, None]
    assert share_out(["0", "1"], 2) == ["0", "1"]
    assert share_out(["4", "5", "6", "7"], 2) == ["4,5", "6,7"]
    assert share_out(["3"], 2) == ["3", "3"]


def test_status_tells_how_far_a_dead_run_was_and_goes_on_telling(tmp_path: Path, micro_wan: Path) -> None:
    config = harvest_config(tmp_path / "set", micro_wan)
    harvest(config)
    (beat_path,) = (config.out / RUNS).glob("*/heartbeat.json")
    beat = json.loads(beat_path.read_bytes()) | {"state": "running", "stage": "denoise", "pid": 2**22 + 1}
    beat_path.write_text(json.dumps(beat))
    assert "dead(in denoise), slice 0/1, 24 of 24 records" in lines(survey(config.out))[-1]
    words = [sys.executable, "-m", "harvest", "status", str(config.out), "--json", "--watch", "0.1"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.kill()
    assert [facts["records"] for facts in told] == [24, 24]


ENVIRONMENTS = [
    ({}, WHOLE, False),
    ({"RANK": "2", "WORLD_SIZE": "4"}, Slice(rank=2, size=4), True),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "8"}, Slice(rank=1, size=8), True),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, WHOLE, False),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, WHOLE, False),
    (
        {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "3"},
        Slice(rank=2, size=3),
        False,
    ),
    (
        {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"},
        Slice(rank=3, size=8),
        True,
    ),
]


@pytest.mark.parametrize(("environment", "part", "launched"), ENVIRONMENTS)
def test_launchers_say_the_slice(environment: dict[str, str], part: Slice, launched: bool) -> None:
    assert slice_of(environment, None) == part and is_launched(environment) == launched
    assert slice_of(environment, "1/3") == Slice(rank=1, size=3)


def test_slices_share_all_items_and_no_item_twice() -> None:
    for part in (WHOLE, Slice(rank=1, size=3)):
        shares = [{place for place in range(100) if piece.holds(place)} for piece in part.split(4)]
        assert set.union(*shares) == {place for place in range(100) if part.holds(place)}
        assert sum(map(len, shares)) == len(set.union(*shares))
    for text in ("3/3", "x", "1/0", "-1/2"):
        with pytest.raises(BadUsage, match="--slice"):
            parse_slice(text)


def test_a_launched_process_sees_its_own_gpu() -> None:
    def seen(**environment: str) -> str | None:
        see_own_gpu(environment)
        return environment.get("CUDA_VISIBLE_DEVICES")

    launched = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert seen(**launched) == "1"
    assert seen(**launched, CUDA_VISIBLE_DEVICES="4,6") == "6"
    assert seen(**launched, CUDA_VISIBLE_DEVICES="3") == "3"  # bound by srun already
    assert seen(CUDA_VISIBLE_DEVICES="0,1") == "0,1" and seen() is None


def test_what_a_process_of_its_own_finds_arrives_faults_included(tmp_path: Path, micro_wan: Path) -> None:
    config = harvest_config(tmp_path / "set", micro_wan)
    assert placed_workers_asked_apart(config, {(64, 64)}, lambda: None) == 1
    too_little = harvest_config(
        tmp_path / "set", micro_wan, teacher=config.teacher.model_dump() | {"placement": "gpu0"}
    )
    with pytest.raises(Refused, match="the teacher does not fit") as caught:
        placed_workers_asked_apart(too_little, {(64, 64)}, lambda: None)
    assert caught.value.mend and str(caught.value).count("found:") == 1
