"""What is on its way: what blocks is named, what is not needed yet is not waited for, what was seen is remembered."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import Corrupt, Refused, Stopped
from common.log import Log
from common.shards import RUNS
from common.stop import StopRequest
from common.watch import STACKS_NAME, Watch, read_heartbeat
from harvest.config import TeacherConfig
from harvest.loading import arrivals
from harvest.loading.arrivals import Arrivals, file_system_of, thread_states
from harvest.loading.folder import resolve
from harvest.loading.identity import Remembered
from harvest.loading.networks import Networks
from harvest.placing.places import CPU, Place, Placement
from harvest.running.events import HarvestWatch
from harvest.teacher import Fingerprints
from harvest.teachers import load_teacher
from tests.harvest.test_resume import as_file
from tests.made import harvest_config, started


class Heard(Log):
    """A log that is read."""

    def __init__(self) -> None:
        super().__init__("test", quiet=True)
        self.lines: list[str] = []

    def say(self, event: str, **facts: Any) -> None:
        self.lines.append(" ".join([event, *(f"{key}={value}" for key, value in facts.items())]))


@pytest.fixture
def folder(micro_wan: Path, tmp_path: Path) -> Path:
    shutil.copytree(micro_wan, tmp_path / "wan")
    return tmp_path / "wan"


def weights_of(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def blocked(path: Path) -> Path:
    """In its place a pipe into which nobody writes: whoever opens it waits, as for a disk that does not answer."""
    path.unlink()
    os.mkfifo(path)
    return path


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("part", ["transformer_2", "text_encoder"])
def test_a_file_that_blocks_is_named_with_its_component(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(arrivals, "QUIET_S", 0.3)
    pipe, log, faults = blocked(weights_of(folder, part)), Heard(), []

    def load() -> None:
        config = TeacherConfig(folder=folder, dtype="float32", device="cpu")
        with Watch(tmp_path / "run", log, interval_s=0.05) as watch, watch.stage("load", deadline_s=1.0):
            try:
                load_teacher(config, resolve(folder, "auto"), watch, log)
            except Corrupt as fault:
                faults.append(fault)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    until(lambda: any("STALLED" in line for line in log.lines))
    beat = read_heartbeat(tmp_path / "run")
    assert beat is not None and beat["state"] == "stalled(load)"
    assert (beat["loading"], beat["file"]) == (part, pipe.name)
    assert "read_header" in (tmp_path / "run" / STACKS_NAME).read_text()
    quiet = next(line for line in log.lines if "NOTHING MOVES" in line)
    assert f"loading {part} file={pipe} file_system=" in quiet
    assert all(word in quiet for word in ("silent=", "bytes_since=0 B", "threads=", "memory="))
    pipe.open("wb").close()
    thread.join(timeout=20)
    assert not thread.is_alive() and pipe.name in str(faults[0])


def test_thread_states_and_file_systems_are_this_machines() -> None:
    assert "S" in thread_states() or "R" in thread_states()
    assert file_system_of(Path("/proc/self")) == "proc on /proc"


def coming(folder: Path, tmp_path: Path, log: Log, how: str = "host") -> Networks:
    resolved = resolve(folder, "auto")
    names = ("text_encoder", "transformer", "transformer_2")
    places = tuple(Place(name=name, num_bytes=0, how=how, device=CPU, kept="memory") for name in names)
    plan = Placement(strategy="cpu", workers=1, device=CPU, places=places, peaks={}, budgets={})
    watch = Watch(tmp_path / "run", log)
    return Networks([resolved.components[name] for name in names], plan, torch.float32, Arrivals(watch, log, {}))


def test_the_first_experts_do_not_wait_for_the_last(folder: Path, tmp_path: Path) -> None:
    networks, pipe = coming(folder, tmp_path, Heard()), blocked(weights_of(folder, "transformer_2"))
    networks.start()
    assert not any(parameter.is_meta for parameter in networks.ready("text_encoder").parameters())
    assert not any(parameter.is_meta for parameter in networks.ready("transformer").parameters())
    pipe.open("wb").close()
    with pytest.raises(Corrupt, match="cannot be read"):
        networks.ready("transformer_2")


def test_a_long_load_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "SAY_S", 0.05)
    log, coming = Heard(), Future[str]()
    with Watch(tmp_path / "run", log) as watch:
        known = Arrivals(watch, log, {})

        def move() -> None:
            for number in range(4):
                known.moved(loading="transformer", file="a", bytes_read=number * 10**9, bytes_total=4 * 10**9)
                time.sleep(0.1)
            coming.set_result("in")

        threading.Thread(target=move).start()
        assert known.wait(coming, "transformer") == "in"
    told = [line for line in log.lines if "loading transformer read=" in line]
    assert told and "of 4.0 GB rate=" in told[0] and "left=" in told[0] and len(told) <= 8


def test_a_fault_behind_reaches_whoever_asks(folder: Path, tmp_path: Path) -> None:
    path = folder / "transformer_2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_dim": 64}))
    networks = coming(folder, tmp_path, Heard())
    networks.start()
    networks.ready("transformer")
    with pytest.raises(Refused, match="another shape"):
        networks.ready("transformer_2")


def prints(folder: Path, tmp_path: Path, **teacher: Any) -> tuple[Fingerprints, list[str]]:
    log = Heard()
    config = TeacherConfig(**{"folder": folder, "dtype": "float32", "device": "cpu", **teacher})
    with Watch(tmp_path / "run", log) as watch:
        return load_teacher(config, resolve(folder, "auto"), watch, log).fingerprints, log.lines


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read for its digest from here on."""
    from harvest.loading import reading as loading

    seen, real = [], loading.read_tensor

    def read(stored: Any, dtype: Any, hearers: Any = ()) -> Any:
        if hearers:
            seen.append(stored.name)
        return real(stored, dtype, hearers)

    monkeypatch.setattr(loading, "read_tensor", read)
    return seen


def test_what_was_hashed_once_is_remembered_until_a_file_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = hashed(monkeypatch)
    first, _ = prints(folder, tmp_path)
    num_hashed = len(seen)
    assert num_hashed > 100
    assert prints(folder, tmp_path)[0] == first and len(seen) == num_hashed
    assert prints(folder, tmp_path, rehash=True)[0] == first and len(seen) == 2 * num_hashed
    path = weights_of(folder, "transformer")
    copy = path.read_bytes()
    path.write_bytes(copy[:-4] + bytes(4))
    changed, _ = prints(folder, tmp_path)
    assert changed.weights != first.weights and changed.text_encoder == first.text_encoder


@pytest.mark.parametrize("swapped", [False, True])
def test_swapped_experts_are_warned_of_and_right_ones_are_not(tmp_path: Path, swapped: bool) -> None:
    folder = tmp_path / "shapes"
    shutil.copytree("configs/teachers/shapes", folder)
    if swapped:
        (folder / "transformer").rename(folder / "aside")
        (folder / "transformer_2").rename(folder / "transformer")
        (folder / "aside").rename(folder / "transformer_2")
    for _ in range(2):  # seen for the first time, and remembered
        _, lines = prints(folder, tmp_path)
        assert any("WARNING transformer and transformer_2 look swapped" in line for line in lines) == swapped


def test_a_teacher_of_noise_gets_no_verdict(folder: Path, tmp_path: Path) -> None:
    assert not any("WARNING" in line for line in prints(folder, tmp_path)[1])


def test_an_encoder_that_changes_its_mind_is_warned_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harvest.teachers.wan import WanTeacher

    real = WanTeacher.encode

    def encode(self: Any, prompts: list[str]) -> list[torch.Tensor]:
        return [rows + 1e-6 * torch.rand(()) for rows in real(self, prompts)]

    monkeypatch.setattr(WanTeacher, "encode", encode)
    assert any("WARNING the text encoder gives another answer" in line for line in prints(folder, tmp_path)[1])


def test_a_torn_memory_costs_only_time(folder: Path, tmp_path: Path) -> None:
    parts = [resolve(folder, "auto").components["transformer"]]
    memory = Remembered(parts, torch.float32, {})
    assert memory.recall() is None
    memory.write({"digests": {}})
    assert memory.recall() == {"digests": {}} and Remembered(parts, torch.bfloat16, {}).recall() is None
    memory._path.write_bytes(memory._path.read_bytes()[:20])
    assert memory.recall() is None


def test_who_is_asked_to_stop_while_loading_leaves_at_once(tmp_path: Path, micro_wan: Path) -> None:
    """What is not read yet is not read any more: of a 57 GB folder that is most of it."""
    from harvest.loading import networks

    read: list[str] = []
    folder = shutil.copytree(micro_wan, tmp_path / "wan")

    def slow(*words: Any, **named: Any) -> Any:
        read.append(words[0].name)
        time.sleep(0.3)
        return real(*words, **named)

    from harvest.loading import reading

    real = reading.read_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "read_tensor", slow)
        process_began = time.monotonic()

        class Stopping(Watch):
            def moved(self, **facts: Any) -> None:
                if time.monotonic() - process_began > 1.0:
                    raise Stopped(wrong="stopped", found="test", mend="")

        config = harvest_config(tmp_path / "set", folder)
        with pytest.raises(Stopped), Stopping(tmp_path / "run", Log("test", quiet=True)) as watch:
            load_teacher(config.teacher, resolve(folder, "auto"), watch, Log("test", quiet=True))
        num_read = len(read)
        time.sleep(1.5)
        assert len(read) <= num_read + networks.THREADS


@pytest.mark.parametrize("where", ["header", "bytes", "prepare", "check"])
def test_a_wish_to_stop_is_heard_while_a_read_hangs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A disk that does not answer moves nothing: neither bytes nor, before, whoever waited for them."""
    from harvest.loading import prepare, reading, weights

    module, name = {"header": (weights, "read_header"), "prepare": (prepare, "read_tensor")}.get(
        where, (reading, "read_tensor")
    )
    part, real = "vae" if where == "check" else "transformer", getattr(module, name)
    hung, let_go = threading.Event(), threading.Event()

    def hanging(first: Any, *others: Any) -> Any:
        if getattr(first, "path", first).parent.name == part:
            hung.set()
            let_go.wait(60)
        return real(first, *others)

    def ask() -> None:
        hung.wait(60)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, name, hanging)
    prepared = {"prepared": tmp_path / "ready"} if where == "prepare" else {}
    config = TeacherConfig(folder=folder, dtype="float32", device="cpu", **prepared)
    asker = threading.Thread(target=ask)
    with StopRequest() as stop, HarvestWatch(tmp_path / "run", Heard(), stop, None) as watch:
        asker.start()
        try:
            with pytest.raises(Stopped, match="SIGTERM"):
                load_teacher(config, resolve(folder, "auto"), watch, Heard())
            assert hung.is_set() and not let_go.is_set()
        finally:
            let_go.set()
            asker.join()


def test_a_read_that_hangs_keeps_no_process_from_ending(folder: Path, tmp_path: Path) -> None:
    pipe = blocked(weights_of(folder, "transformer"))
    path = as_file(harvest_config(tmp_path / "set", folder), tmp_path / "c.yaml")
    process = started("harvest", "run", path)
    until(lambda: any((tmp_path / "set" / RUNS).glob("*/heartbeat.json")), 60)
    (beat,) = (tmp_path / "set" / RUNS).glob("*/heartbeat.json")
    until(lambda: json.loads(beat.read_text()).get("file") == pipe.name, 60)
    process.terminate()
    assert process.wait(20) == 75
