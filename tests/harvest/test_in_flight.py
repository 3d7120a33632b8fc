"""Micro-batches side by side, where an expert is split over devices: the same bytes, and nobody waits for a device."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harvest.config import HarvestConfig
from harvest.loading.transfer import sent
from harvest.meaning import make_contract
from harvest.placing.placement import place
from harvest.placing.places import Machine, Wish
from harvest.rollout import rollout, side_by_side
from harvest.teacher import Work
from tests.harvest.test_placement import A14B, GB, SPLIT, loaded
from tests.made import harvest_config, planned

WORK = Work(records=3, height=64, width=64)


def asked(teacher: Any, config: HarvestConfig, in_flight: int) -> tuple[list[Any], list[str]]:
    """Records of the first item, and which micro-batch was asked when, by its first number."""
    contract = make_contract(config, teacher.facts, teacher.fingerprints, teacher.compute_dtype)
    order: list[str] = []
    real = teacher.predict_with

    def predict_with(number: int, latents: torch.Tensor, timesteps: torch.Tensor, condition: Any) -> Any:
        order.append(f"{number}/{id(condition)}")
        return real(number, latents, timesteps, condition)

    teacher.predict_with, teacher.in_flight = predict_with, in_flight
    try:
        item = planned(config).items[0]
        return rollout(teacher, item, contract, micro_batch=config.micro_batch, moved=lambda: None), order
    finally:
        teacher.predict_with = real


@pytest.mark.parametrize("changes", [{}, {"source": "renoise"}, {"solver": "checkpoint", "jitter": False}], ids=str)
def test_walked_side_by_side_over_cpu_and_disk_gives_the_same_bytes(
    micro_wan: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = harvest_config(tmp_path / "set", micro_wan, records_per_shard=8, **changes)
    alone, one_by_one = asked(loaded(micro_wan, tmp_path, WORK), config, 1)
    split = loaded(micro_wan, tmp_path, WORK, prepared=tmp_path / "ready", placement=SPLIT)
    for in_flight in (2, 5):
        records, order = asked(split, config, in_flight)
        assert [record.digest() for record in records] == [record.digest() for record in alone]
        assert len(order) == len(one_by_one) and len(set(order[:2])) == 2 > len(set(one_by_one[:2]))
        experts = [entry.split("/")[0] for entry in order[: 3 * config.steps]]
        assert experts == sorted(experts)  # still one change of experts an item


def test_steps_take_turns_and_no_more_than_so_many_are_under_way() -> None:
    begun, ended, told = set(), set(), []

    def walk(name: str, steps: int) -> Iterator[None]:
        begun.add(name)
        for number in range(steps):
            told.append(f"{name}{number}")
            assert len(begun - ended) <= 2
            yield
        ended.add(name)

    moved: list[int] = []
    side_by_side((walk(name, steps) for name, steps in (("a", 3), ("b", 1), ("c", 2), ("d", 0))), 2,
                 lambda: moved.append(1))  # fmt: skip
    assert told == ["a0", "b0", "a1", "a2", "c0", "c1"]
    assert len(moved) == 6 and ended == set("abcd")


class Elsewhere:
    """A device that computes nothing yet: whoever asks it for a number fails."""

    device, in_flight = "meta", 3

    def __init__(self, teacher: Any) -> None:
        self._teacher = teacher

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        texts: list[torch.Tensor] = self._teacher.encode(prompts)
        return texts

    def condition(self, texts: list[torch.Tensor], negative: torch.Tensor) -> None: ...

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, condition: None) -> tuple[torch.Tensor, ...]:
        assert latents.is_meta and not timesteps.is_meta
        return latents * 2, latents * 3


@pytest.mark.parametrize("source", ["trajectory", "renoise"])
def test_no_step_waits_for_the_device(
    micro_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """The launches run ahead: a number that were read back would stop all devices but one."""
    config = harvest_config(tmp_path / "set", micro_wan, records_per_shard=8, source=source)
    teacher = loaded(micro_wan, tmp_path, WORK)
    contract = make_contract(config, teacher.facts, teacher.fingerprints, teacher.compute_dtype)
    monkeypatch.setattr("harvest.rollout.Walker.record", lambda walker, item: walker)
    item = planned(config).items[0]
    moved: list[int] = []
    walkers: Any = rollout(Elsewhere(teacher), item, contract, micro_batch=3, moved=lambda: moved.append(1))  # type: ignore[arg-type]
    assert len(moved) >= 3 * config.steps and all(len(walker.points) == config.keep for walker in walkers)
    assert all(tensor.is_meta for walker in walkers for point in walker.points.values() for tensor in point.values())
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(walkers[0].state.sum())


def test_as_many_are_under_way_as_gpus_share_an_expert() -> None:
    machine = Machine(gpus={f"cuda:{n}": 24 * GB for n in range(4)}, host=128 * GB)
    plan = place(A14B, machine, Wish(work_bytes=4 * GB, kept_bytes=3 * GB))
    assert (plan.strategy, plan.in_flight) == ("balanced", 4) and "4 under way" in plan.cost
    one = place(A14B, Machine(gpus={"cuda:0": 80 * GB}, host=128 * GB), Wish(work_bytes=4 * GB))
    assert one.in_flight == 1


def test_what_is_sent_is_what_arrives() -> None:
    numbers = torch.from_numpy(np.arange(6, dtype=np.float32))
    assert torch.equal(sent(numbers, "cpu"), numbers)


@pytest.mark.gpu
def test_what_is_sent_to_a_gpu_waits_for_nothing_and_arrives() -> None:
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        busy = busy @ busy * 1e-3
    there = sent(torch.arange(6.0), "cuda")
    assert not torch.cuda.current_stream().query()
    assert there.cpu().tolist() == list(range(6))
