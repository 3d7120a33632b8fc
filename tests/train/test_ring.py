"""Whoever dies, stalls or is stopped: the sequence of steps is the same, and nothing is left behind."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import BadUsage, Partial
from common.shards import ShardSet
from tests.made import ROOT
from tests.train.test_data import copied, feed, made_set, saying, steps_of
from train.feed import ring
from train.feed.ring import Ring

PARENT = """
import sys, time
from pathlib import Path
from common.shards import ShardSet
from tests.train.test_data import feed
source = feed(ShardSet.open(Path(sys.argv[1])), read_workers=2)
steps = iter(source)
for _ in range(3):
    next(steps)
print(*[hand.process.pid for hand in source._reader._hands.values()], flush=True)
if sys.argv[2] == "raise":
    raise SystemExit("on purpose")
time.sleep(60)
"""


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return made_set(tmp_path / "set", sides=(64, 128))


def pids(source: Any) -> list[int]:
    return [hand.process.pid for hand in source._reader._hands.values()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(numbers: list[int], *, within_s: float = 10.0) -> bool:
    until = time.monotonic() + within_s
    while any(map(is_running, numbers)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(is_running, numbers))


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_workers_are_named_replaced_and_change_nothing(shards: ShardSet, workers: int) -> None:
    expected = list(steps_of(shards, 16))
    said: list[str] = []
    killed = []
    with feed(shards, read_workers=workers, say=saying(said)) as source:
        for number, step in zip(range(16), source, strict=False):
            assert copied(step) == expected[number]
            if number % 5 == 2:
                killed.append(pids(source)[number % workers])
                os.kill(killed[-1], signal.SIGKILL)
                assert gone(killed[-1:])  # a signal takes its time: only of the gone can it be noticed
        first, last = set(killed), pids(source)
    assert len(first) == 3 and not first & set(last)
    for pid in killed:
        assert sum(f"(pid {pid}) died and is replaced exit=-9" in line for line in said) == 1
    assert gone([*killed, *last])


def test_workers_killed_while_they_read_change_nothing(shards: ShardSet) -> None:
    expected = list(steps_of(shards, 40, micro_batch=6))
    rng = random.Random(0)
    said: list[str] = []
    with feed(shards, read_workers=2, micro_batch=6, say=saying(said)) as source:
        for number, step in zip(range(40), source, strict=False):
            assert copied(step) == expected[number]
            if number % 4 == 0:
                hand = rng.choice([*source._reader._hands.values()])  # type: ignore[attr-defined]
                threading.Timer(rng.uniform(0, 0.002), hand.process.kill).start()
    assert sum("died and is replaced" in line for line in said) >= 3


def test_workers_that_are_all_killed_once_are_all_replaced(shards: ShardSet) -> None:
    """Three deaths at one part, and nobody's third."""
    expected = list(steps_of(shards, 6))
    with feed(shards, read_workers=4) as source:
        for number, step in zip(range(6), source, strict=False):
            assert copied(step) == expected[number]
            if number == 2:
                for pid in pids(source):
                    os.kill(pid, signal.SIGKILL)
                assert gone(pids(source))


def test_a_step_of_very_many_micro_batches_does_not_stop_up_the_channels(shards: ShardSet) -> None:
    """Who only writes until the other reads, waits for ever."""
    how = {"global_batch": 700, "micro_batch": 1}
    assert list(steps_of(shards, 2, read_workers=2, **how)) == list(steps_of(shards, 2, **how))


def test_a_worker_that_no_signal_ends_does_not_keep_the_run(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sits in a disk that does not answer: the kernel ends it when that does."""
    monkeypatch.setattr(ring, "END_S", 0.2)
    source = feed(shards, read_workers=1)
    (hand,) = source._reader._hands.values()  # type: ignore[attr-defined]
    monkeypatch.setattr(hand.process, "kill", lambda: None)
    os.kill(hand.process.pid, signal.SIGSTOP)
    start = time.monotonic()
    source.close()
    assert time.monotonic() - start < 5
    os.kill(hand.process.pid, signal.SIGKILL)
    hand.process.wait()


def test_a_worker_that_dies_at_its_start_is_replaced_too(shards: ShardSet) -> None:
    with feed(shards, read_workers=1) as source:
        steps = iter(source)
        os.kill(pids(source)[0], signal.SIGKILL)
        assert copied(next(steps)) == next(steps_of(shards, 1))


def test_three_deaths_at_one_batch_are_a_fault_that_names_the_item(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    started = Ring._start

    def stillborn(ring: Ring, number: int) -> Any:
        hand = started(ring, number)
        hand.process.kill()
        return hand

    monkeypatch.setattr(Ring, "_start", stillborn)
    item = r"item [0-9a-f]{16}, record number \d+, point \d"
    with feed(shards, read_workers=1, say=saying(said)) as source:
        with pytest.raises(Partial, match=rf"3 workers died .* batch 0; found: the last one was .*{item}"):
            next(iter(source))
        assert len(said) == 3


def test_a_stopped_worker_meets_the_deadline_under_its_name(shards: ShardSet) -> None:
    with feed(shards, read_workers=1, deadline_s=1.0) as source:
        steps = iter(source)
        next(steps)
        (pid,) = pids(source)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(Partial, match=rf"worker 0 \(pid {pid}\) has not filled batch \d+ for 1 s; .*reading item"):
            for _, _step in zip(range(5), steps, strict=False):
                pass
    assert gone([pid])


@pytest.mark.parametrize("end", ["kill", "raise"])
def test_workers_end_with_their_parent(shards: ShardSet, end: str) -> None:
    words = [sys.executable, "-c", PARENT, str(shards.path), end]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        numbers = [int(word) for word in parent.stdout.readline().split()]
        assert len(numbers) == 2
        if end == "kill":
            parent.kill()
        assert gone(numbers)
        parent.wait(timeout=20)


def test_the_run_is_asked_to_stop_not_its_workers(shards: ShardSet) -> None:
    with feed(shards, read_workers=1) as source:
        steps = iter(source)
        next(steps)
        before = pids(source)
        for asked in (signal.SIGINT, signal.SIGTERM):
            os.kill(before[0], asked)
        for _ in range(6):
            next(steps)
        assert pids(source) == before


def test_a_worker_has_no_torch_and_its_memory_no_name(shards: ShardSet) -> None:
    with feed(shards, read_workers=1) as source:
        next(iter(source))
        (pid,) = pids(source)
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "/memfd:wan-lite ring (deleted)" in maps and "/dev/shm/" not in maps and "torch" not in maps


def test_too_many_workers_are_refused(shards: ShardSet) -> None:
    with pytest.raises(BadUsage, match="read_workers: 9999"):
        feed(shards, read_workers=9999)


def test_closing_twice_is_closing(shards: ShardSet) -> None:
    source = feed(shards, read_workers=2)
    numbers = pids(source)
    source.close()
    source.close()
    assert gone(numbers, within_s=0)
