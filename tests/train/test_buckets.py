"""Where DistributedDataParallel averages, gradients have one home: its buckets, from the first micro-batch on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.config import check
from common.log import Log
from common.stop import StopRequest
from tests.train.ranks import together
from train.config import TrainConfig
from train.dist import HOST, FlatGradients, World
from train.loop import set_up
from train.optim import full_state
from train.step import Stepper


@dataclass(frozen=True)
class LikeGpus(World):
    """Averages as GPUs do, on CPUs."""

    def wrap(self, student: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(student, gradient_as_bucket_view=True, broadcast_buffers=False)

    def flat_gradients(self, student: nn.Module) -> FlatGradients | None:
        return None


def stepped(rank: int, settings: dict[str, Any], folder: Path) -> tuple[bool, list[set[tuple[int, int]]], int]:
    """Whether weights and moments are those of flat gradients, bit for bit; the places of gradients, and their bytes,
    after each micro-batch; the bytes of all parameters."""
    ends = []
    for kind in (World, LikeGpus):
        config = check(TrainConfig, settings | {"out": folder / kind.__name__}, source="test")
        log = Log("test", quiet=True)
        run = set_up(config, kind(rank=rank, size=2, device=HOST), log, StopRequest(None), follow_s=0.0)
        stepper = Stepper(config, run.world, run.state, run.objective, None, run.total_steps)
        places = watched(stepper, list(run.state.student.parameters()))
        feed = run.feed(log, batch_size=1)
        try:
            steps = iter(feed)
            first = next(steps)
            stepper.rehearse(first.micros[0])
            stepper.take(first)
            for _ in range(3):
                stepper.take(next(steps))
        finally:
            feed.close()
        ends.append([value.clone() for _, value in full_state(run.state.student, run.state.optimizers)])
        ends[-1] += [weight.clone() for weight in run.state.weights().values()]
    same = all(torch.equal(flat, bucketed) for flat, bucketed in zip(*ends, strict=True))
    return same, places, sum(weight.nbytes for weight in run.state.weights().values())


def watched(stepper: Stepper, parameters: list[nn.Parameter]) -> list[set[tuple[int, int]]]:
    places: list[set[tuple[int, int]]] = []
    real = stepper.backward

    def backward(*inputs: Any, **options: Any) -> Tensor:
        errors = real(*inputs, **options)
        storages = [each.grad.untyped_storage() for each in parameters if each.grad is not None]
        places.append({(storage.data_ptr(), storage.nbytes()) for storage in storages})
        return errors

    stepper.backward = backward  # type: ignore[method-assign]
    return places


def test_gradients_grow_in_the_buckets_and_nowhere_beside(tmp_path: Path, micro_set: Path, micro_init: Path) -> None:
    """Three micro-batches a step, of which the last one is sent; of so few parameters there is one bucket, which is
    laid anew in their order of arrival after the first step."""
    settings = {"set": micro_set, "init": micro_init, "batch_size": 1, "global_batch": 6, "warmup_steps": 0,
                "threads": 1, "device": "cpu"}  # fmt: skip
    for same, places, size in together(2, stepped, settings, tmp_path):
        assert same and len(places) == 1 + 4 * 3
        assert all(len(each) == 1 and next(iter(each))[1] == size for each in places)
        assert len({next(iter(each)) for each in places}) <= 2
