"""Workers that load together: one reads, all have the same; whoever dies is named, whoever comes late loads alone."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.errors import Fault, Refused
from common.watch import Watch
from harvest.config import TeacherConfig
from harvest.loading import circle
from harvest.loading.circle import Circle, join
from harvest.loading.folder import Component
from harvest.loading.identity import tensor_digests
from harvest.loading.networks import shared_parts
from harvest.placing.places import Place, Placement
from harvest.teacher import Work
from tests.harvest.test_arrivals import Heard
from tests.harvest.test_placement import loaded
from tests.made import ROOT

CODE = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
import torch
from common.errors import Fault
from common.log import Log
from common.watch import Watch
from harvest.config import TeacherConfig
from harvest.loading import circle, reading
from harvest.loading.folder import resolve
from harvest.loading.identity import tensor_digests
from harvest.teachers import load_teacher

folder, run_dir, mischief = sys.argv[1:]
torch.set_num_threads(1)
circle.JOIN_S = 60.0
read, real = [], reading.read_tensor

def counted(stored, *others):
    if mischief and read and stored.path.parent.name == "transformer_2":
        os.kill(os.getpid(), signal.SIGKILL)
    read.append(stored.path.parent.name)
    return real(stored, *others)

reading.read_tensor = counted
log = Log("test", Path(run_dir))
try:
    with Watch(Path(run_dir), log) as watch:
        config = TeacherConfig(folder=folder, dtype="bfloat16", device="cpu", broadcast=True)
        teacher = load_teacher(config, resolve(Path(folder), "auto"), watch, log)
        names = ("text_encoder", "transformer", "transformer_2")
        digests = {name: tensor_digests(teacher._networks.model(name)) for name in names}
        text = teacher.encode(["a red cat"])
        cond, uncond = teacher.predict(torch.ones(1, 16, 8, 8), torch.tensor([300.0]), teacher.condition(text, text[0]))
    until = time.monotonic() + 20
    while torch.distributed.is_initialized() and time.monotonic() < until:
        time.sleep(0.05)
    print(json.dumps({"read": sorted(set(read) - {"vae"}), "digests": digests, "weights": teacher.fingerprints.weights,
                      "cond": hashlib.sha256(cond.numpy().tobytes()).hexdigest(),
                      "group": torch.distributed.is_initialized()}))
except Fault as fault:
    print(json.dumps({"fault": str(fault)}))
    sys.exit(fault.exit_code)
"""


def begun(folder: Path, home: Path, name: str, mischief: str = "") -> "subprocess.Popen[str]":
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    told = {"HARVEST_WORKERS_HERE": "2", "TMPDIR": str(home / "tmp"), "XDG_CACHE_HOME": str(home / "cache")}
    words = [sys.executable, "-c", CODE, str(folder), str(home / name), mischief]
    environment = os.environ | told | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)


def ended(process: "subprocess.Popen[str]") -> Any:
    out, _ = process.communicate(timeout=240)
    return json.loads(out.splitlines()[-1]) if out.strip() else {}


@pytest.fixture
def meeting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HARVEST_WORKERS_HERE", "2")
    return tmp_path


def test_one_reads_and_all_have_the_same_bit_for_bit(micro_wan: Path, tmp_path: Path) -> None:
    processes = [begun(micro_wan, tmp_path, name) for name in ("a", "b")]
    alone = loaded(micro_wan, tmp_path, Work(), dtype="bfloat16")
    names = ("text_encoder", "transformer", "transformer_2")
    text = alone.encode(["a red cat"])
    cond, _ = alone.predict(torch.ones(1, 16, 8, 8), torch.tensor([300.0]), alone.condition(text, text[0]))
    expected = {
        "digests": {name: tensor_digests(alone._networks.model(name)) for name in names},
        "weights": alone.fingerprints.weights,
        "cond": hashlib.sha256(cond.numpy().tobytes()).hexdigest(),
        "group": False,
    }
    told = [ended(process) for process in processes]
    assert sorted(len(one.pop("read")) for one in told) == [0, 3]
    assert told == [expected, expected]
    assert [path.name.endswith("-done") for path in (tmp_path / "tmp").glob("wan-lite-*/load-*")] == [True]


def test_who_dies_is_named_by_those_who_wait(micro_wan: Path, tmp_path: Path) -> None:
    """In whatever they wait: for a component, for torch's own group, for a broadcast."""
    processes = [begun(micro_wan, tmp_path, name, mischief="die") for name in ("a", "b")]
    try:
        deadline = time.monotonic() + 240
        while any(process.poll() is None for process in processes):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        reader, other = sorted(processes, key=lambda process: process.returncode)
        assert (reader.returncode, other.returncode) == (-signal.SIGKILL, 1)
        fault = ended(other)["fault"]
        assert f"worker {reader.pid} is gone" in fault and "common load broke off at t" in fault
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_who_falls_silent_is_named_too(meeting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever still reads is waited for."""
    monkeypatch.setattr(circle, "SILENT_S", 0.5)
    store, moved = dist.FileStore(str(meeting / "store"), -1), []
    silent = subprocess.Popen(["sleep", "60"])
    try:
        one = Circle(store, 1, [silent.pid, os.getpid()], "cpu", lambda **facts: moved.append(facts))
        reading = threading.Timer(0.4, lambda: store.add("pulse", 1))
        reading.start()
        began = time.monotonic()
        with pytest.raises(Fault, match=rf"broke off at transformer; found: worker {silent.pid} was silent"):
            one.take("transformer", lambda *_: torch.empty(0))
        assert time.monotonic() - began > 0.8 and moved == [
            {"loading": "transformer", "file": "read by another worker"}
        ]
    finally:
        silent.kill()
        silent.wait()
    with pytest.raises(Fault, match=f"worker {silent.pid} is gone"):
        one.take("transformer", lambda *_: torch.empty(0))


def joined(tmp_path: Path, *whats: str) -> tuple[list[Circle | None], list[str]]:
    """As many workers as there are things that they load, at the same time."""
    config, log, found = TeacherConfig(folder=Path(), broadcast=True), Heard(), list[Circle | None]()
    with Watch(tmp_path / "run", log) as watch:

        def one(what: str) -> None:
            found.append(join(config, "cpu", {"files": what}, watch, lambda **_: None, log))

        threads = [threading.Thread(target=one, args=(what,)) for what in whats]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found, log.lines


def test_who_has_nobody_to_share_with_loads_alone(meeting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "broadcast: the workers do not load the same in the same way, each loads alone"
    assert joined(meeting, "this", "that") == ([None, None], [other, other])
    assert joined(meeting, "this")[1] == ["broadcast: the others came before, this worker loads alone"]
    monkeypatch.setattr(circle, "JOIN_S", 0.2)
    monkeypatch.setattr(tempfile, "tempdir", str(meeting / "run"))
    assert joined(meeting, "this") == ([None], ["broadcast: 1 of 2 workers came, each loads alone"])
    # He goes his own way: whoever comes a moment later is not told to wait for him.
    assert joined(meeting, "this") == ([None], ["broadcast: another worker went alone, each loads alone"])


def test_those_who_load_the_same_meet_once(meeting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = joined(meeting, "this", "this")
    assert sorted(one.rank for one in found if one) == [0, 1]
    for one in found:
        assert one is not None
        one.leave()
    assert joined(meeting, "this")[0] == [None]
    monkeypatch.delenv("HARVEST_WORKERS_HERE")
    assert joined(meeting, "this") == ([None], [])


def test_nobody_meets_where_others_may_write(meeting: Path) -> None:
    (meeting / f"wan-lite-{os.getuid()}").mkdir(mode=0o777)
    (meeting / f"wan-lite-{os.getuid()}").chmod(0o777)
    with pytest.raises(Refused, match="others may write"), Watch(meeting / "run", Heard()) as watch:
        join(TeacherConfig(folder=Path(), broadcast=True), "cpu", {}, watch, lambda **_: None, Heard())


@pytest.mark.parametrize(("how", "device", "kept", "prepared", "shared"), [
    ("resident", "cuda:0", "", False, True), ("resident", "cuda:0", "", True, True),
    ("resident", "cuda:1", "", False, False), ("turns", "cuda:0", "pinned", False, False),
    ("stream", "cuda:0", "pinned", False, False), ("host", "cpu", "memory", False, False),
])  # fmt: skip
def test_what_stays_on_the_gpu_is_shared(how: str, device: str, kept: str, prepared: bool, shared: bool) -> None:
    """An encoder that computes on the CPU beside it is not: NCCL knows no host memory."""
    part = Component(name="a", library="", class_name="", folder=Path(), config={}, variant=None, files=(),
                     prepared=prepared)  # fmt: skip
    place = Place(name="a", num_bytes=1, how=how, device=device, kept=kept)
    plan = Placement(strategy="", workers=2, device="cuda:0", places=(place,), peaks={}, budgets={})
    assert bool(shared_parts([part], plan)) == shared
    on_cpu = replace(plan, device="cpu", places=(replace(place, how="host", device="cpu", kept="memory"),))
    assert bool(shared_parts([part], on_cpu)) != prepared
