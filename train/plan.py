"""What a training would need, from its files' headers alone: no weight is read, no torch is imported.

    for line in plan_lines(config, num_gpus=4, gpu_bytes=24e9, samples_per_s=None): ...

Memory of one GPU, part by part:

    weights, gradients, EMA     4 bytes a parameter each, the EMA on the first GPU alone; the optimizer 4 a moment
                                (AdamW has two, Muon one), shared by all GPUs when it is sharded; what is frozen has no
                                gradient and no moments, and beside adapters (lora) no average
    half-precision copies       2 bytes a parameter while autocast is on
    activations                 what the backward pass of one micro-batch needs, see `activation_bytes`

`tests/train/test_plan.py` holds the activations against what autograd really keeps.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import BadUsage
from common.log import human_bytes, human_seconds
from common.manifest import Receipt
from common.shards import ShardSet
from common.tensor_file import read_header
from train.config import TrainConfig, lies_in
from train.feed.slots import Spans
from train.run_folder import read_metrics
from train.segments import spans_of
from train.student.config import StudentConfig, read_config

SPARE = 0.92
"""The part of a GPU's memory that can be counted on; the rest is the context and the allocator's gaps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes of one GPU, by part."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def plan_lines(config: TrainConfig, *, num_gpus: int, gpu_bytes: float, samples_per_s: float | None) -> Iterator[str]:
    student, shapes = _student(config.init)
    trains = trained(config, shapes)
    num_parameters, num_trained = (sum(map(math.prod, some.values())) for some in (shapes, trains))
    shards = ShardSet.open(config.set)
    receipts = shards.manifest().receipts
    side = max(((receipt.height, receipt.width) for receipt in receipts), default=(512, 512), key=math.prod)
    spans = spans_of(config.segments, shards.contract) if config.objective == "segment" else None
    points = _trained_points(receipts, spans)
    millions = num_parameters / 1e6
    share = "" if num_trained == num_parameters else f", {num_trained / 1e6:.3g} M of them trained"
    yield f"student of {millions:.1f} M parameters{share}; {points} samples an epoch, the largest {side[0]}x{side[1]}"
    num_moments = moments(config, trains)
    needs = functools.partial(memory, student=student, num_parameters=num_parameters, num_trained=num_trained,
                              num_moments=num_moments, side=side, num_gpus=num_gpus)  # fmt: skip
    need = needs(config)
    yield f"memory of each of {num_gpus} GPUs at batch_size {config.batch_size}:"
    for name, size in need.parts.items():
        yield f"  {name:24} {human_bytes(size):>9}"
    room = SPARE * gpu_bytes
    yield f"  {'together':24} {human_bytes(need.total):>9} of {human_bytes(gpu_bytes)}"
    if need.total <= room:
        yield "it fits"
    else:
        yield "it does not fit; what does:"
        yield from _mends(config, needs, num_gpus=num_gpus, room=room)
    size = checkpoint_bytes(num_trained if config.lora else num_parameters, num_moments)
    at_once = config.keep_checkpoints + 1  # one is being written
    yield f"on the disk: {at_once} checkpoints of {human_bytes(size)} at once, {human_bytes(at_once * size)}"
    global_batch = config.global_batch or config.batch_size * num_gpus
    steps = math.ceil(config.num_epochs * points / global_batch)
    yield f"{steps} steps of {global_batch} for {config.num_epochs:g} epochs"
    rate = samples_per_s or _measured(config.out)
    if rate:
        yield f"at {rate:.0f} samples/s: {human_seconds(steps * global_batch / rate)}"
    else:
        yield "how long: unknown before a rate is measured; run a hundred steps, or give --samples-per-s"


def memory(config: TrainConfig, *, student: StudentConfig, num_parameters: int, num_trained: int,
           num_moments: int, side: tuple[int, int], num_gpus: int) -> Need:  # fmt: skip
    p, taught = float(num_parameters), float(num_trained)
    half = config.precision != "float32"
    parts = {
        "weights": 4 * (p + (taught if config.lora else 0)),
        "gradients": 4 * taught,
        "optimizer": 4 * num_moments / (num_gpus if config.sharded_optimizer else 1),
        "EMA": 0.0 if config.ema_on_host else 4 * (taught if config.lora else p),
        "half-precision copies": 2 * p if half else 0.0,
        "activations": activation_bytes(config, student, side),
    }
    return Need(parts={name: size for name, size in parts.items() if size})


def trained(config: TrainConfig, shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Of `shapes`, the student's tensors, those that are not frozen; or the adapters beside them."""
    if config.lora is None:
        return {name: shape for name, shape in shapes.items()
                if not any(lies_in(name, part) for part in config.frozen)}  # fmt: skip
    rank = config.lora.rank
    adapted = {name: shape for name, shape in shapes.items()
               if len(shape) == 2 and config.lora.adapts(name.removesuffix(".weight"))}  # fmt: skip
    return {f"{name}.{end}": sides for name, (rows, columns) in adapted.items()
            for end, sides in (("lora_A", (rank, columns)), ("lora_B", (rows, rank)))}  # fmt: skip


def moments(config: TrainConfig, trains: Mapping[str, Sequence[int]]) -> int:
    """Numbers that the optimizer keeps."""
    return sum(math.prod(shape) * (1 if config.by_muon(name, shape) else 2) for name, shape in trains.items())


def checkpoint_bytes(num_kept: int, num_moments: int) -> int:
    """Weights, their average and the optimizer's moments, in float32."""
    return 4 * (2 * num_kept + num_moments)


def activation_bytes(config: TrainConfig, student: StudentConfig, side: tuple[int, int]) -> float:
    """Of one micro-batch, with an attention that keeps no table of weights. Per block and token, in units of the
    width: 10 of float32 (norms, modulated states, residuals) and 9 + 2 x ffn / width in the forward's precision; per
    block and text row 3. With checkpointing only each block's input stays, and one block's activations beside."""
    width = student.width
    half = 2 if config.precision != "float32" else 4
    tokens = config.batch_size * math.prod(part // (student.vae_stride * student.patch) for part in side)
    rows = config.batch_size * min(student.text_max_length, 128)
    block = tokens * width * (10 * 4 + (9 + 2 * student.ffn_dim / width) * half) + rows * width * 3 * half
    if config.gradient_checkpointing:
        return student.num_layers * tokens * width * 4 + block
    return student.num_layers * block


def _mends(config: TrainConfig, needs: Callable[[TrainConfig], Need], *, num_gpus: int, room: float) -> Iterator[str]:
    """The cheapest first: each alone, then all of them."""
    smaller = max(1, config.batch_size // 2)
    choices: dict[str, dict[str, Any]] = {
        "gradient_checkpointing: true": {"gradient_checkpointing": True},
        f"batch_size: {smaller}": {"batch_size": smaller},
        "ema_on_host: true": {"ema_on_host": True},
        "sharded_optimizer: true": {"sharded_optimizer": True},
        "all of these and batch_size: 1": {
            "gradient_checkpointing": True, "ema_on_host": True, "sharded_optimizer": True, "batch_size": 1},
    }  # fmt: skip
    if num_gpus == 1:
        del choices["sharded_optimizer: true"]
    for name, changes in choices.items():
        total = needs(config.model_copy(update=changes)).total
        yield f"  {name}: {human_bytes(total)}{', fits' if total <= room else ''}"


def _student(folder: Path) -> tuple[StudentConfig, dict[str, tuple[int, ...]]]:
    path = folder / "model.safetensors"
    if not path.exists():
        raise BadUsage(wrong="there is no student to plan for", found=f"nothing in {folder}",
                       mend="python -m train init first")  # fmt: skip
    return read_config(folder), {name: stored.shape for name, stored in read_header(path).items()}


def _trained_points(receipts: tuple[Receipt, ...], spans: Spans | None) -> int:
    """With segments, the points where one begins."""
    numbers = ((int((~receipt.held_out_records()).sum()), receipt.num_points) for receipt in receipts)
    return sum(trained * (num_points if spans is None else len(spans)) for trained, num_points in numbers)


def _measured(out: Path) -> float | None:
    """The last rate that a run of this configuration wrote down."""
    rates = [line["samples_per_s"] for line in read_metrics(out) if "samples_per_s" in line]
    return float(rates[-1]) if rates else None
