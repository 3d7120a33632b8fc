"""What a sick teacher, a full disk or a full memory does to a run: it is said, counted, and nothing is lost."""

import contextlib
import errno
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import files
from common.errors import Partial, Refused
from common.log import Log
from common.schedule import contract_grid, expert_of, kept_steps
from common.shards import ShardSet
from common.stop import StopRequest
from harvest.config import HarvestConfig
from harvest.loading.folder import resolve
from harvest.quarantine import notes_of
from harvest.running.check import check
from harvest.running.health import FEW, Health, odd_prediction, step_of
from harvest.running.shortage import memory_told, with_room
from harvest.running.writer import Writer
from tests.made import harvest_config, harvest_here, made_contract, made_record, planned, tree


def test_predictions_that_say_nothing_or_too_much_are_named() -> None:
    contract = made_contract(encoding="float32", latent_dtype="float32")
    assert odd_prediction(made_record(1, contract)) is None
    flat = made_record(1, contract)
    flat.uncond[1] = 0.25
    assert odd_prediction(flat) == {
        "what": "constant",
        "where": f"uncond[1] (t={flat.timesteps[1]:.1f}, expert {flat.expert[1]})",
    }
    loud = made_record(2, contract)
    loud.cond[0] *= 1e4
    assert odd_prediction(loud) == {
        "what": "exploding",
        "where": f"cond[0] (t={loud.timesteps[0]:.1f}, expert {loud.expert[0]})",
    }
    alone = made_record(3, made_contract(encoding="float32", latent_dtype="float32", branches="guided"))
    assert odd_prediction(alone) is None
    alone.guided[1] *= 1e4
    assert (odd_prediction(alone) or {})["where"].startswith("guided[1] (t=")


def test_a_text_encoder_that_overflows_is_named(tmp_path: Path) -> None:
    shards = ShardSet.create(tmp_path / "set", made_contract())
    record = made_record(0)
    record.text[1, 2] = np.inf
    good, faults = Health(shards, 0.05, Log("test", quiet=True)).sift([record, made_record(1)])
    assert [record.key for record in good] == [made_record(1).key]
    assert faults[0]["key"] == record.key and "text encoder" in faults[0]["where"]


def test_a_few_are_set_aside_and_too_many_stop_the_run(tmp_path: Path) -> None:
    shards = ShardSet.create(tmp_path / "set", made_contract())
    health = Health(shards, 0.05, Log("test", quiet=True))
    for number in range(int(0.05 * FEW) + 1):
        health.require_few()
        record = made_record(number)
        record.cond[0, 0, 0, 0] = np.nan
        health.sift([record])
    with pytest.raises(Partial, match="6 of 6 records had to be quarantined"):
        health.require_few()


def test_a_disk_that_fills_up_stops_cleanly_and_says_what_is_needed(
    tmp_path: Path, micro_wan: Path, micro_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two shards nothing more fits; with room again, the same command gives the same set."""
    config = harvest_config(tmp_path / "set", micro_wan, deadline_s=0.5)
    real = files._write

    def full(fd: int, data: Any) -> int:
        if len(list((config.out / "receipts").glob("[!.]*"))) >= 2:
            raise OSError(errno.ENOSPC, "no space")
        return real(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write", full)
        with pytest.raises(Partial, match=r"no space left.*kB are still to be written") as caught:
            harvest_here(config)
    assert caught.value.exit_code == 3 and len(list(planned(config).remaining(ShardSet.open(config.out)))) == 4
    assert tree(harvest_here(config)) == tree(micro_set)


def test_room_that_is_made_while_it_works_is_taken(
    tmp_path: Path,
    micro_wan: Path,
    micro_set: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, failed = harvest_config(tmp_path / "set", micro_wan), []
    real = files._write

    def full(fd: int, data: Any) -> int:
        if len(failed) < 3 and len(list((config.out / "receipts").glob("[!.]*"))) == 2:
            failed.append(fd)
            raise OSError(errno.ENOSPC, "no space")
        return real(fd, data)

    monkeypatch.setattr(files, "_write", full)
    monkeypatch.setattr("harvest.running.shortage.ROOM_EVERY_S", 0.05)
    assert tree(harvest_here(config)) == tree(micro_set)
    assert len(failed) == 3 and capsys.readouterr().err.count("waiting for room, 10m00s at most") == 1


def test_who_waits_for_room_hears_a_wish_to_stop() -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "no space")

    began = time.monotonic()
    with pytest.raises(OSError, match="no space"):
        with_room(full, 600, StopRequest(limit_s=0.0), Log("test", quiet=True))
    assert time.monotonic() - began < 5


def test_out_of_memory_is_said_with_what_held_it_and_what_would_help(micro_config: HarvestConfig) -> None:
    resolved = resolve(micro_config.teacher.folder, micro_config.teacher.variant)
    with (
        pytest.raises(Refused, match=r"held by: this process .* weights of vae .*micro_batch=1") as caught,
        memory_told(micro_config, resolved),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "batched_guidance=false" in caught.value.mend
    with pytest.raises(RuntimeError, match="size"), memory_told(micro_config, resolved):
        torch.zeros(2) + torch.zeros(3)


def test_the_writer_keeps_order_bounds_memory_and_hands_on_its_errors() -> None:
    done: list[int] = []
    alive, most = 0, 0
    lock = threading.Lock()

    def finish(number: int) -> None:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        time.sleep(0.01)
        if number == 5:
            raise OSError("disk")
        done.append(number)
        with lock:
            alive -= 1

    with pytest.raises(OSError, match="disk"), Writer(finish, contextlib.nullcontext) as writer:
        for number in range(10):
            writer.put(number)
    assert done == [0, 1, 2, 3, 4] and most == 1
    with pytest.raises(KeyError), Writer(done.append, contextlib.nullcontext) as writer:
        writer.put(6)
        raise KeyError  # the item before is whole all the same
    assert done[-1] == 6


def test_check_walks_one_micro_batch_and_leaves_nothing(
    tmp_path: Path, micro_wan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = harvest_config(tmp_path / "deep" / "set", micro_wan)
    check(config)
    said = capsys.readouterr().err
    for stage in ("load", "encode", "denoise", "write", "verify"):
        assert f"check: {stage} seconds=" in said
    assert "3 records of 64x64" in said
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["prompts.txt"]


def _kept(key: str, shards: ShardSet) -> list[int]:
    grid = contract_grid(shards.contract, int(key, 16))
    experts = expert_of(grid.timesteps, shards.contract.boundary)
    return [int(step) for step in kept_steps(key, 8, 2, experts, (0,))]


def test_the_step_in_a_note_is_the_one_that_the_solver_took(micro_set: Path) -> None:
    """Of records as they were walked: the step's own noise level is the point's."""
    shards = ShardSet.open(micro_set)
    reader = shards.read(shards.manifest().receipts[0])
    for number in range(4):
        record = reader.record(number)
        grid = contract_grid(shards.contract, int(record.key, 16))
        for point, t in enumerate(record.timesteps):
            step = step_of(record, f"cond[{point}] (t={t:.1f}, expert 0)", shards.contract)["step"]
            assert grid.timesteps[int(step.split()[0])] == t


def test_a_quarantine_note_says_what_where_and_who(tmp_path: Path) -> None:
    shards = ShardSet.create(tmp_path / "set", made_contract())
    health = Health(shards, 1.0, Log("test", quiet=True))
    record = made_record(3)
    record.uncond[1, 2, 0, 0] = np.inf
    good, faults = health.sift([record])
    assert good == [] and health.num_bad == 1
    from harvest.plan import Question, WorkItem

    item = WorkItem(questions=(Question(key=record.key, prompt=record.prompt, seed=3),), height=64, width=64)
    health.set_aside(item, faults)
    ((entry,),) = [note.faults for note in notes_of(shards.path)]
    assert entry["key"] == record.key and entry["what"] == "not finite"
    assert entry["where"] == f"uncond[1] (t={record.timesteps[1]:.1f}, expert {record.expert[1]})"
    assert entry["step"] == f"{_kept(record.key, shards)[1]} of 8"
    final = made_record(4)
    final.final[0, 0, 0] = np.nan
    assert "step" not in Health(shards, 1.0, Log("test", quiet=True)).sift([final])[1][0]
    with pytest.raises(Partial, match="1 records were set aside"):
        health.complain()
