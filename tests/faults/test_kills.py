"""Kills, failing disks, rival writers, copies under way: what is committed is right, what is not does not exist."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import files
from common.files import TEMPORARY_PREFIX
from common.shards import ShardSet
from harvest.granary.verify import verify
from tests.faults.writer import NUM_ITEMS, look, records_of, write_missing
from tests.made import NUMERICS, ROOT, made_contract, made_record, tree

EXPECTED = {record.key: record.digest() for item in range(NUM_ITEMS) for record in records_of(item)}


@pytest.mark.parametrize("kills", [40, pytest.param(1000, marks=pytest.mark.full)])
def test_sigkill_at_any_moment_leaves_a_right_set(tmp_path: Path, kills: int) -> None:
    words = [sys.executable, "-m", "tests.faults.writer", str(tmp_path / "set"), str(kills), "7"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=1200)
    found = json.loads(done.stdout)
    assert found["faults"] == [] and found["done"] == NUM_ITEMS
    assert found["in_the_middle"] > kills // 20, "the kills came too early or too late to mean anything"


class Crash:
    """At the n-th call of the disk the machine loses power: what was not synced is torn, the process is gone."""

    def __init__(self, number: int) -> None:
        self.calls, self.number, self.unsynced = 0, number, set[str]()
        files._write = self._before(files._write)
        files._fsync = self._before(files._fsync)
        files._rename = self._before(files._rename)
        files._link = self._before(files._link)

    def _before(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == self.number:
                self._lose_power(arguments)
            done = real(*arguments)
            if isinstance(arguments[0], int):
                path = os.readlink(f"/proc/self/fd/{arguments[0]}")
                self.unsynced.discard(path) if len(arguments) == 1 else self.unsynced.add(path)
            return done

        return call

    def _lose_power(self, arguments: tuple[Any, ...]) -> None:
        if len(arguments) == 2 and isinstance(arguments[0], int):  # a write: half of it arrives
            os.write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            self.unsynced.add(os.readlink(f"/proc/self/fd/{arguments[0]}"))
        for path in self.unsynced:
            if os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
        os._exit(3)


@pytest.mark.parametrize("container", ["zarr", "tar"])
def test_power_lost_at_every_call_of_the_disk(tmp_path: Path, container: str) -> None:
    import zarr  # noqa: F401

    number, crashed = 0, True
    while crashed:
        number += 1
        path = tmp_path / str(number)
        child = os.fork()
        if child == 0:
            Crash(number)
            shards = ShardSet.create(path, made_contract())
            for item in range(2):
                shards.commit(records_of(item), NUMERICS, container=container)
            os._exit(0)
        crashed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        _, faults = look(path, EXPECTED)
        assert faults == [], number
        write_missing(path, container)
        count, faults = look(path, EXPECTED)
        assert (count, faults) == (NUM_ITEMS, []), number
        shutil.rmtree(path)
    assert number > 20, "a commit is more than a few calls"


@pytest.mark.parametrize("container", ["zarr", "tar"])
def test_a_disk_that_is_full_at_any_call(tmp_path: Path, container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.common.test_files import FailingAt

    number, failed = 0, True
    while failed:
        number += 1
        shards = ShardSet.create(tmp_path / str(number), made_contract())
        with monkeypatch.context() as patch:
            failing = FailingAt(number, patch, torn=number % 2 == 0)
            try:
                shards.commit(records_of(0), NUMERICS, container=container)
            except OSError as error:
                assert "no space" in str(error)
        failed = failing.calls >= number
        assert look(shards.path, EXPECTED)[1] == [] and not list(shards.path.rglob(f"{TEMPORARY_PREFIX}*"))
        shards.commit(records_of(0), NUMERICS, container=container)
        assert look(shards.path, EXPECTED) == (1, []) and list(verify(shards)) == []
    assert number > 12, "three files at least, four calls each"


@pytest.mark.parametrize("rounds", [6, pytest.param(100, marks=pytest.mark.full)])
@pytest.mark.parametrize("same_numerics", [True, False])
def test_two_writers_on_the_same_items(tmp_path: Path, rounds: int, same_numerics: bool) -> None:
    """Another process with equal or other last bits: exactly one of them has committed each item."""
    import zarr  # noqa: F401

    for number in range(rounds):
        path = tmp_path / str(number)
        children = []
        for writer in range(3):
            child = os.fork()
            if child == 0:
                shards = ShardSet.create(path, made_contract())
                for item in range(NUM_ITEMS):
                    records = records_of(item)
                    if writer and not same_numerics:  # last bits of another device
                        for record in records:
                            record.final[0, 0, 0] += np.float16(0.25 * writer)
                    shards.commit(records, NUMERICS, container=("zarr", "tar")[item % 2])
                os._exit(0)
            children.append(child)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
        shards = ShardSet.open(path)
        assert list(verify(shards)) == []
        count, faults = look(path, EXPECTED if same_numerics else {**EXPECTED, **_digests(shards)})
        assert (count, faults) == (NUM_ITEMS, [])


def _digests(shards: ShardSet) -> dict[str, str]:
    headers = [shards.read(receipt).header for receipt in shards.manifest().receipts]
    return {key: digest for header in headers for key, digest in zip(header.keys, header.digests, strict=True)}


def test_a_set_that_is_being_copied_can_be_opened(tmp_path: Path) -> None:
    """Files arrive in any order, by parts, receipts before their shards too: what is whole is there, and no more."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    write_missing(source, "zarr")
    extra = [made_record(number) for number in range(100, 104)]
    ShardSet.open(source).commit(extra, NUMERICS, container="tar")
    expected = EXPECTED | {record.key: record.digest() for record in extra}
    copy.mkdir()
    shutil.copy(source / "contract.json", copy / "contract.json")
    names = [path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.name != "contract.json"]
    rng = np.random.default_rng(0)
    names.sort(key=lambda name: (name.parts[1][:16], float(rng.random())) if rng.random() < 0.7 else ("z", 0.0))
    counts = []
    for name in names:
        data = (source / name).read_bytes()
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        for size in (len(data) // 3, len(data)):
            (copy / name).write_bytes(data[:size])
            shards = ShardSet.open(copy)
            manifest = shards.manifest()
            counts.append(len(manifest.receipts))
            headers = [shards.read(receipt).header for receipt in manifest.receipts]
            told = {key: digest for header in headers for key, digest in zip(header.keys, header.digests, strict=True)}
            assert told.items() <= expected.items()
    assert counts == sorted(counts) and counts[-1] == NUM_ITEMS + 1 and len(set(counts)) > 3
    assert tree(copy) == tree(source)
