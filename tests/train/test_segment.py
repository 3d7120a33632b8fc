"""A student of few steps, from the feed to the pictures: each point comes with the end of its segment."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import check
from common.schedule import contract_grid
from common.shards import ShardSet
from tests.made import NUMERICS, harvest_config, harvest_here, made_contract, made_record
from train.config import TrainConfig
from train.dist import World
from train.feed.data import Feed, Step
from train.feed.order import Order
from train.feed.slots import FINAL, Spans
from train.loop import train
from train.plan import plan_lines
from train.run_folder import read_metrics

SPANS: Spans = ((0, 2), (2, FINAL))
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def made_set(folder: Path, container: str, encoding: str) -> ShardSet:
    contract = made_contract(
        keep=3, keep_at=(0, 2, 5), encoding=encoding, latent_dtype="float32" if encoding == "float32" else "float16"
    )
    shards = ShardSet.create(folder, contract)
    for first in (0, 4):
        records = [made_record(first + number, contract) for number in range(4)]
        shards.commit(records, NUMERICS, container=container)
    return shards


def steps(shards: ShardSet, count: int, **changes: Any) -> Iterator[Step]:
    receipts = shards.manifest().receipts
    order = Order(0, lambda epoch: receipts, points=tuple(begin for begin, _ in SPANS))
    feed = Feed(shards, order, global_batch=8, micro_batch=4, rank=0, world=1, spans=SPANS, **changes)
    with feed:
        for _, step in zip(range(count), feed, strict=False):
            yield step


@pytest.mark.parametrize("read_workers", [0, 1])
@pytest.mark.parametrize(("container", "encoding"), [
    ("zarr", "float16"), ("tar", "float32"), ("zarr", "int8-block64"), ("zarr+zstd", "float16"),
])  # fmt: skip
def test_each_point_comes_with_the_end_of_its_segment(
    tmp_path: Path, container: str, encoding: str, read_workers: int
) -> None:
    shards = made_set(tmp_path / "set", container, encoding)
    end_of, seen = dict(SPANS), set()
    for step in steps(shards, 2, read_workers=read_workers):
        rows = [(micro, row) for micro in step.micros for row in range(4)]
        for (micro, row), sample in zip(rows, step.samples, strict=True):
            record = shards.read(sample.receipt).record(sample.record)
            end = end_of[sample.point]
            state, sigma, t = (record.final, 0.0, 0.0) if end == FINAL else (
                record.latents[end], record.sigmas[end], record.timesteps[end])  # fmt: skip
            assert micro.end is not None and micro.end_sigmas is not None and micro.end_timesteps is not None
            np.testing.assert_array_equal(micro.end[row], state)
            np.testing.assert_array_equal(micro.latents[row], record.latents[sample.point])
            assert (micro.end_sigmas[row], micro.end_timesteps[row]) == (sigma, t)
            seen.add(sample.id)
    assert len(seen) == 16, "eight records begin two segments each; no other point is asked about"


def test_who_asks_for_no_segments_reads_none(tmp_path: Path) -> None:
    shards = made_set(tmp_path / "set", "zarr", "float16")
    receipts = shards.manifest().receipts
    with Feed(shards, Order(0, lambda epoch: receipts), global_batch=4, micro_batch=4, rank=0, world=1) as feed:
        assert next(iter(feed)).micros[0].end is None


@pytest.fixture(scope="module")
def path_set(tmp_path_factory: pytest.TempPathFactory, micro_wan: Path) -> Path:
    """Whole paths of four steps, without jitter."""
    out = tmp_path_factory.mktemp("paths") / "set"
    return harvest_here(harvest_config(out, micro_wan, steps=4, keep=4, jitter=False))


def test_a_few_step_student_is_trained_drawn_and_measured(tmp_path: Path, path_set: Path, micro_init: Path) -> None:
    from train.evaluate import evaluate
    from train.sample import sample

    run = tmp_path / "run"
    config = check(TrainConfig, {
        "set": path_set, "init": micro_init, "out": run, "objective": "segment", "segments": 2, "batch_size": 8,
        "num_epochs": 20, "lr": 2e-3, "warmup_steps": 5, "log_every": 10, "threads": 1, "device": "cpu",
        "save_samples": True, "sample_interval": 10,
    }, source="test")  # fmt: skip
    train(config, ALONE)
    losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert json.loads(max(run.glob("checkpoints/*/state.json")).read_bytes())["step"] == 24 * 2 * 20 // 8
    assert (run / "samples" / "epoch_0010_sample_00.png").exists()
    assert sample(run, num=2, steps=None).size[0] > 64
    trained = evaluate(run, num=6, steps=None, grader=lambda picture, prompt: picture.mean() > 0)
    assert trained["steps"] == 2 and trained["graded"]["score"] == {"student": 1.0, "teacher": 1.0, "ratio": 1.0}
    first = check(TrainConfig, config.model_dump() | {"out": tmp_path / "first", "lr": 1e-9}, source="test")
    train(first, ALONE)
    untrained = evaluate(tmp_path / "first", num=6, steps=None, grader=None)
    assert trained["psnr"] > untrained["psnr"] + 1


@pytest.mark.parametrize("read_workers", [0, 1])
def test_segments_are_found_among_points_that_were_drawn(tmp_path: Path, micro_wan: Path, read_workers: int) -> None:
    """Every record keeps the edges and two more points of its own: their numbers differ from record to record."""
    from train.feed.slots import FINAL
    from train.held_out import HeldOut, only_pinned
    from train.objective import objective_of

    set_path = harvest_here(harvest_config(tmp_path / "set", micro_wan, steps=12, keep=6))
    shards = ShardSet.open(set_path)
    assert shards.contract.keep_at == (0, 3, 6, 9)
    config = check(TrainConfig, {"set": set_path, "init": "i", "out": "o", "objective": "segment"}, source="test")
    objective = objective_of(config, shards.contract)
    receipts, seen = shards.manifest().receipts, set()
    order = Order(0, lambda epoch: receipts, points=tuple(begin for begin, _ in objective.spans or ()))
    with Feed(shards, order, global_batch=8, micro_batch=8, rank=0, world=1, spans=objective.spans,
              read_workers=read_workers) as feed:  # fmt: skip
        for _, step in zip(range(6), feed, strict=False):
            micro = step.micros[0]
            assert micro.end is not None and micro.end_sigmas is not None
            for row, sample in enumerate(step.samples):
                record = shards.read(sample.receipt).record(sample.record)
                edges = contract_grid(shards.contract, int(record.key, 16)).sigmas[[0, 3, 6, 9, 12]]
                assert (micro.sigmas[row], micro.end_sigmas[row]) == (edges[sample.point], edges[sample.point + 1])
                at = int(np.flatnonzero(record.sigmas == edges[sample.point])[0])
                np.testing.assert_array_equal(micro.latents[row], record.latents[at])
                seen.add(at - sample.point)
    assert len(seen) > 1, "else nothing was drawn between the edges"
    records = [shards.read(receipts[0]).record(index) for index in range(2)]
    assert [len(only_pinned(record, shards.contract).sigmas) for record in records] == [4, 4]
    held_out = HeldOut(objective, records, text_rows=9, device=torch.device("cpu"))
    assert held_out.num_points == 8 and dict(objective.spans or ())[3] == FINAL


def test_the_plan_counts_what_the_run_takes_and_a_long_warm_up_is_said(
    tmp_path: Path, micro_wan: Path, micro_init: Path
) -> None:
    """Four of six kept points begin a segment."""
    set_path = harvest_here(harvest_config(tmp_path / "set", micro_wan, steps=8, keep=6, keep_at=[0, 2, 4, 6]))
    values = {"set": set_path, "init": micro_init, "out": tmp_path / "run", "objective": "segment", "num_epochs": 1,
              "batch_size": 8, "warmup_steps": 1000, "device": "cpu"}  # fmt: skip
    config = check(TrainConfig, values, source="test")
    planned = next(plan_lines(config, num_gpus=1, gpu_bytes=1e12, samples_per_s=None))
    train(config, ALONE)
    said = (tmp_path / "run" / "log.txt").read_text()
    (count,) = re.findall(r"(\d+) samples an epoch", said)
    assert f"; {count} samples an epoch" in planned and "1000 of them WARM UP" in said
