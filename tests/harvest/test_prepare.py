"""Prepared weights: the same tensors, mapped; stale, torn, interrupted or rival preparations never serve."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import harvest.loading.prepare as prepare_module
from common.errors import Corrupt, Partial, Refused
from common.files import TEMPORARY_PREFIX
from common.log import Log
from common.tensor_file import read_header
from harvest.loading.folder import Resolved, resolve
from harvest.loading.hands import Hands
from harvest.loading.identity import tensor_digests
from harvest.loading.prepare import (
    LOCK_NAME,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    from_prepared,
    is_fresh,
    prepare,
    prepared_digests,
)
from harvest.loading.weights import build, fill_model, load_model
from tests.harvest.test_arrivals import prints
from tests.harvest.test_loading import same_tensors, stock
from tests.harvest.test_resume import as_file
from tests.made import command, harvest_config, started, tree

BF16 = torch.bfloat16
PARTS = ("transformer", "transformer_2", "text_encoder", "vae")


@pytest.fixture
def resolved(micro_wan: Path, tmp_path: Path) -> Resolved:
    shutil.copytree(micro_wan, tmp_path / "wan")
    return resolve(tmp_path / "wan", "auto")


def quietly(resolved: Resolved, out: Path, dtype: torch.dtype = BF16) -> Path:
    return prepare(resolved, out, dtype, Log("test", quiet=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_prepared_weights_are_the_stock_ones_bitwise(
    resolved: Resolved, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    ready = from_prepared(resolved, quietly(resolved, tmp_path / "out", dtype))
    same_tensors(load_model(ready.components[name], dtype), stock(resolved, name, dtype))
    assert ready.components[name].kind == "prepared"


@pytest.mark.parametrize("name", PARTS)
def test_a_prepared_teacher_has_its_fingerprint(resolved: Resolved, tmp_path: Path, name: str) -> None:
    """From the manifest, from its bytes, and as the unprepared one has it."""
    ready = from_prepared(resolved, quietly(resolved, tmp_path / "out"))
    part = ready.components[name]
    model = load_model(part, BF16)
    plain = load_model(resolved.components[name], BF16)
    assert prepared_digests(part) == tensor_digests(model) == tensor_digests(plain)


def test_what_is_fresh_is_left_alone_and_what_is_stale_made_again(resolved: Resolved, tmp_path: Path) -> None:
    out = quietly(resolved, tmp_path / "out")
    before = tree(out)
    stamp = (out / "transformer" / WEIGHTS_NAME).stat().st_mtime_ns
    quietly(resolved, out)
    assert (out / "transformer" / WEIGHTS_NAME).stat().st_mtime_ns == stamp
    assert not is_fresh(resolved, out, torch.float16)
    source = resolved.components["transformer"].files[0]
    os.utime(source, ns=(1, 1))
    assert not is_fresh(resolve(resolved.folder, "auto"), out, BF16)
    quietly(resolve(resolved.folder, "auto"), out)
    again = tree(out)
    assert {name for name in before if before[name] != again[name]} - {LOCK_NAME} == {MANIFEST_NAME}


def test_a_torn_preparation_does_not_serve(resolved: Resolved, tmp_path: Path) -> None:
    out = quietly(resolved, tmp_path / "out")
    path = out / "transformer" / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-10])
    assert not is_fresh(resolved, out, BF16)
    quietly(resolved, out)
    load_model(from_prepared(resolved, out).components["transformer"], BF16)


def test_a_library_that_keeps_other_modules_in_float32_has_another_policy(
    resolved: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import WanTransformer3DModel

    out, folder = quietly(resolved, tmp_path / "out"), resolved.folder
    before, _ = prints(folder, tmp_path, dtype="bfloat16")
    kept = [name for name in WanTransformer3DModel._keep_in_fp32_modules if name != "norm2"]
    monkeypatch.setattr(WanTransformer3DModel, "_keep_in_fp32_modules", kept)
    assert not is_fresh(resolved, out, BF16)
    ready = from_prepared(resolved, quietly(resolved, out))
    assert load_model(ready.components["transformer"], BF16).blocks[0].norm2.weight.dtype == BF16
    assert prints(folder, tmp_path, dtype="bfloat16")[0].weights != before.weights
    assert prints(folder, tmp_path, dtype="bfloat16", prepared=out)[0] == prints(folder, tmp_path, dtype="bfloat16")[0]


def test_a_preparation_from_before_the_policy_stood_in_it_serves(resolved: Resolved, tmp_path: Path) -> None:
    out = quietly(resolved, tmp_path / "out")
    manifest = json.loads((out / MANIFEST_NAME).read_bytes())
    del manifest["float32"]
    (out / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert is_fresh(resolved, out, BF16)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_a_flipped_bit_in_what_was_prepared_is_named(
    resolved: Resolved, tmp_path: Path, name: str, mapped: bool
) -> None:
    """Size and time are what they were, and the value is finite: only its checksum tells."""
    ready = from_prepared(resolved, quietly(resolved, tmp_path / "out")).components[name]
    path = ready.files[0]
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[-3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    pool, moved = Hands(2, "bytes"), lambda **_: None
    try:
        with pytest.raises(Corrupt, match="is not what was prepared") as caught:
            fill_model(ready, build(ready), BF16, pool=pool, moved=moved, mapped=mapped)
        assert max(ready.crcs, key=lambda tensor: read_header(path)[tensor].offset) in caught.value.found
        fill_model(replace(ready, crcs={}), build(ready), BF16, pool=pool, moved=moved, mapped=mapped)  # an older one
    finally:
        pool.finish()


def test_what_was_looked_at_once_is_looked_at_again_when_it_changes_or_on_request(
    resolved: Resolved, tmp_path: Path
) -> None:
    out = quietly(resolved, tmp_path / "out")
    how = {"dtype": "bfloat16", "prepared": out}
    prints(resolved.folder, tmp_path, **how)
    path = out / "transformer_2" / WEIGHTS_NAME
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(Corrupt, match="is not what was prepared"):
        prints(resolved.folder, tmp_path, **how)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(Corrupt, match="is not what was prepared"):
        prints(resolved.folder, tmp_path, **how, rehash=True)


def test_another_dtype_is_refused(resolved: Resolved, tmp_path: Path) -> None:
    ready = from_prepared(resolved, quietly(resolved, tmp_path / "out"))
    with pytest.raises(Refused, match="prepared for another dtype"):
        load_model(ready.components["transformer"], torch.float16)


def test_too_small_a_disk_is_refused_before_a_byte_is_written(
    resolved: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=100_000))
    with pytest.raises(Partial, match="do not fit"):
        quietly(resolved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_nothing_that_serves(
    resolved: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.common.test_files import FailingAt

    for number in (1, 20, 60):
        with monkeypatch.context() as patch:
            FailingAt(number, patch, torn=True)
            with pytest.raises(OSError, match="no space"):
                quietly(resolved, tmp_path / "out")
        assert not is_fresh(resolved, tmp_path / "out", BF16)
        assert not list((tmp_path / "out").rglob(f"{TEMPORARY_PREFIX}*"))
    quietly(resolved, tmp_path / "out")
    assert is_fresh(resolved, tmp_path / "out", BF16)


def test_a_read_only_teacher_is_prepared_elsewhere(resolved: Resolved, tmp_path: Path) -> None:
    for path in [resolved.folder, *resolved.folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    quietly(resolved, tmp_path / "out")
    for path in [resolved.folder, *resolved.folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1])
def test_killed_while_preparing_then_run_again(resolved: Resolved, tmp_path: Path, delay: float) -> None:
    """And two at once: whoever is last writes the same bytes."""
    config = harvest_config(
        tmp_path / "set", resolved.folder, teacher={"prepared": tmp_path / "out", "dtype": "bfloat16"}
    )
    path = as_file(config, tmp_path / "c.yaml")
    process = started("harvest", "prepare", path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rivals = [started("harvest", "prepare", path) for _ in range(2)]
    assert [rival.wait(timeout=100) for rival in rivals] == [0, 0]
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_bytes())
    assert is_fresh(resolved, tmp_path / "out", BF16) and set(manifest["components"]) == set(PARTS)
    ready = from_prepared(resolved, tmp_path / "out")
    same_tensors(load_model(ready.components["transformer_2"], BF16), stock(resolved, "transformer_2", BF16))


def test_a_harvest_from_prepared_weights_gives_the_same_set(tmp_path: Path, micro_wan: Path, micro_set: Path) -> None:
    config = harvest_config(tmp_path / "set", micro_wan, teacher={"prepared": tmp_path / "ready"})
    done = command("harvest", "run", as_file(config, tmp_path / "c.yaml"))
    assert done.returncode == 0 and "(prepared files)" in done.stderr
    assert tree(tmp_path / "set", without=("runs", "assets")) == tree(micro_set, without=("runs", "assets"))


def test_a_preparation_that_broke_off_speaks_for_no_teacher(
    resolved: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared for one teacher, then half for another of the same shapes: the first one's manifest must not stand."""
    from tests.micro import write_micro_wan

    out = quietly(resolved, tmp_path / "out")
    other = resolve(write_micro_wan(tmp_path / "other", seed=9), "auto")
    real, written = prepare_module.write_atomic, []

    def broken(path: Path, content: object) -> None:
        if written:
            raise OSError("the power is gone")
        written.append(path)
        real(path, content)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare_module, "write_atomic", broken)
    with pytest.raises(OSError, match="power"):
        quietly(other, out)
    assert written and not is_fresh(resolved, out, BF16) and not is_fresh(other, out, BF16)


def test_workers_that_come_together_prepare_once(resolved: Resolved, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    class Counting(Log):
        lines: ClassVar[list[str]] = []

        def say(self, event: str, **facts: object) -> None:
            self.lines.append(event)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: prepare(resolved, tmp_path / "out", BF16, Counting("t", quiet=True)), range(3)))
    assert sum(line == "prepared transformer" for line in Counting.lines) == 1


def test_who_waits_for_a_preparation_moves_only_as_its_bytes_do(tmp_path: Path) -> None:
    """Else a holder that hangs would keep everyone who waits for him from ever saying so."""
    told: list[dict[str, object]] = []
    heard: list[int] = []
    look = prepare_module._onlooker(tmp_path, lambda **facts: told.append(facts), lambda: heard.append(len(told)))
    (tmp_path / "part").mkdir()
    look("somebody")
    look("somebody")
    (tmp_path / "part" / "weights").write_bytes(b"1" * 9)
    look("somebody")
    look("somebody")
    assert heard == [1, 2] and {facts["waiting_for"] for facts in told} == {"somebody"}


@pytest.mark.parametrize("touched", [True, False])
def test_mapped_weights_come_while_they_are_loaded_or_not_before_they_are_used(
    resolved: Resolved, tmp_path: Path, touched: bool
) -> None:
    part = from_prepared(resolved, quietly(resolved, tmp_path / "out")).components["transformer"]
    told: list[dict[str, int]] = []
    pool = Hands(2, "bytes")
    model = fill_model(part, build(part), BF16, pool=pool, moved=lambda **facts: told.append(facts), touched=touched)
    pool.finish()
    held = resident_of(part.files[0])
    assert held >= part.files[0].stat().st_size if touched else held == 0
    came = [facts["bytes_read"] for facts in told if "bytes_read" in facts]
    assert came == sorted(came) and bool(came) == touched
    if touched:
        assert came[-1] == told[-1]["bytes_total"] == sum(t.nbytes for t in model.state_dict().values())


def resident_of(path: Path) -> int:
    """Bytes of a file that this process has mapped and touched."""
    maps = Path("/proc/self/smaps").read_text().split(str(path))
    return sum(int(area.split("Rss:")[1].split()[0]) * 1024 for area in maps[1:])
