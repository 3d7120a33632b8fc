"""What a run needs to go on as if nothing had happened, and its way to the disk and back.

    write_checkpoint(run_dir, snapshot_of(state, facts), keep)      run/checkpoints/<samples_seen>/: whole or not at all
    facts = restore(run_dir, state, log)                     the newest valid one; an older one if that is damaged

Safetensors and JSON only. state.json holds size and crc32c of each file, and of itself; a checkpoint that does not
match is passed over and said so. An older checkpoint is removed only after the newer one was read back.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import Corrupt, Refused
from common.extents import crc32c, measured
from common.files import sweep, write_folder
from common.log import Log
from common.tensor_file import StoredTensor, read_header
from train.loss import NUM_LEVELS
from train.optim import full_state, own_slots
from train.run_folder import CHECKPOINTS, EMA_NAME, MODEL_NAME, OPTIMIZER_NAME, STATE_NAME, checkpoints
from train.student.network import WanLite
from train.student.weights import read_tensor, safetensors_stream, tensors_of

SEAL = "crc32c"
"""Of state.json's other entries."""


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Everything that a step changes."""

    student: WanLite
    kept: tuple[str, ...]
    """Names of the parameters that a checkpoint holds: all, or the adapters alone."""
    ema: dict[str, Tensor]
    """Of all that is kept; of the first rank, the others have none."""
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    """Of the loss, under float16; else it does nothing."""
    samples_seen: int = 0
    step: int = 0
    cursor: dict[str, list[int]] | None = None
    epoch: int = 0
    skipped: list[int] = field(default_factory=list)
    """Steps whose gradient was not finite."""
    level_sums: list[float] = field(default_factory=lambda: [0.0] * (2 * NUM_LEVELS))
    """Of the loss since the last line of the log."""

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the student."""
        parameters = dict(self.student.named_parameters())
        return {name: parameters[name].detach() for name in self.kept}

    def counters(self) -> dict[str, Any]:
        names = ("samples_seen", "step", "epoch", "cursor", "skipped", "level_sums")
        return {name: getattr(self, name) for name in names} | {"scaler": self.scaler.state_dict()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A state at one moment, in host memory of its own."""

    samples_seen: int
    tensors: dict[str, dict[str, Tensor]]
    """File name -> its tensors."""
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    newest: int
    every: int | None = None
    """Checkpoints at multiples of so many steps are never removed."""


def snapshot_of(state: TrainState, facts: Mapping[str, Any]) -> Snapshot:
    """By the first rank, while the others `gather`."""
    tensors = {
        MODEL_NAME: _copied(state.weights().items()),
        EMA_NAME: _copied(state.ema.items()),
        OPTIMIZER_NAME: _copied(full_state(state.student, state.optimizers)),
    }
    summary = json.loads(json.dumps({**state.counters(), **facts}))
    return Snapshot(samples_seen=state.samples_seen, tensors=tensors, summary=summary)


def write_checkpoint(run_dir: Path, snapshot: Snapshot, keep: Keep) -> Path:
    """Write a checkpoint, read it back, then remove those that are not to be kept."""
    folder = run_dir / CHECKPOINTS / f"{snapshot.samples_seen:012d}"
    if folder.exists():  # a damaged one that was passed over: its successor takes its place
        shutil.rmtree(folder)
    write_folder(folder, _contents(snapshot))
    verified(folder)
    # What is newer was passed over as unreadable: it neither counts nor goes, it may be readable tomorrow.
    older = [path for path in checkpoints(run_dir) if path.name < folder.name]
    for old in older[: max(0, len(older) - (keep.newest - 1))]:
        if not is_milestone(old, keep.every):
            shutil.rmtree(old)
    sweep(run_dir / CHECKPOINTS, older_than_s=3600.0)
    return folder


def _contents(snapshot: Snapshot) -> dict[str, Iterator[bytes | memoryview]]:
    """Of its files, tensor by tensor: beside the snapshot nothing is in memory."""
    seen: dict[str, list[int]] = {}

    def weights(name: str) -> Iterator[bytes | memoryview]:
        tensors = snapshot.tensors[name]
        length = crc = 0
        for piece in safetensors_stream({key: tuple(each.shape) for key, each in tensors.items()}, tensors.items(), {}):
            length, crc = length + memoryview(piece).nbytes, crc32c(piece, crc)
            yield piece
        seen[name] = [length, crc]

    def state() -> Iterator[bytes]:
        summary = snapshot.summary | {"files": seen}
        yield json.dumps(summary | {SEAL: _seal(summary)}, indent=1).encode()

    return {**{name: weights(name) for name in snapshot.tensors}, STATE_NAME: state()}


def verified(folder: Path, *names: str) -> dict[str, Any]:
    """state.json, after the files of these names, or all that it tells of, were read and checked, a piece at a time.
    What they hold can be read when it is wanted: a file of a checkpoint never changes, it only goes with the folder."""
    try:
        summary: dict[str, Any] = json.loads((folder / STATE_NAME).read_bytes())
        if summary.pop(SEAL) != _seal(summary):
            raise ValueError(f"{STATE_NAME} does not match its own seal")
        for name in names or summary["files"]:
            length, crc = measured(folder / name)
            if [length, crc] != summary["files"][name]:
                raise ValueError(f"{name}: {length} bytes, crc32c {crc:08x}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(wrong=f"checkpoint {folder} is damaged", found=str(error), mend="use the one before") from None
    return summary


def _seal(summary: Mapping[str, Any]) -> int:
    return crc32c(json.dumps(summary, sort_keys=True).encode())


def verify_lines(path: Path) -> Iterator[str]:
    """Of a checkpoint, or of all those of a run, one line each; Corrupt at the end if one is damaged."""
    folders = [path] if (path / STATE_NAME).exists() else checkpoints(path)
    damaged = []
    for folder in folders:
        try:
            summary = verified(folder)
            num_bytes = sum(length for length, _ in summary["files"].values())
            yield f"{folder}: step {summary['step']}, {num_bytes} bytes match"
        except Corrupt as fault:
            damaged.append(folder.name)
            yield str(fault)
    if damaged or not folders:
        raise Corrupt(
            wrong=f"{len(damaged)} of {len(folders)} checkpoints of {path} are damaged",
            found=", ".join(damaged) or "no checkpoint",
            mend="run the same command again: it goes on from the newest that is whole",
        )


def restore(run_dir: Path, state: TrainState, log: Log) -> dict[str, Any] | None:
    """Fill `state` from the newest valid checkpoint; its facts, or None when there is none at all."""
    last: Corrupt | None = None
    for folder in reversed(checkpoints(run_dir)):
        try:
            summary = verified(folder)
        except Corrupt as fault:
            log.say(f"passing over {fault}")
            last = fault
            continue
        if summary["student"] != state.student.config.to_dict():
            raise Refused(
                wrong=f"{run_dir} holds the checkpoints of another student",
                found=_differing(summary["student"], state.student.config.to_dict()),
                mend="give the init that it began with, or another `out`",
            )
        weights = state.weights()
        _require_alike(run_dir, read_header(folder / MODEL_NAME), weights)
        for name, tensor in tensors_of(folder / MODEL_NAME):
            weights[name].copy_(tensor)
        if state.ema:
            for name, tensor in tensors_of(folder / EMA_NAME):
                state.ema[name].copy_(tensor)
        _restore_optimizers(state, folder / OPTIMIZER_NAME)
        for name in state.counters():
            if name != "scaler":
                setattr(state, name, summary[name])
        if summary["scaler"]:
            state.scaler.load_state_dict(summary["scaler"])
        log.say(f"resumed from {folder.name}", step=state.step, epoch=state.epoch)
        return summary
    if last is not None:
        raise Corrupt(
            wrong=f"no checkpoint of {run_dir} can be read",
            found=last.found,
            mend=f"look at the disk and run again; to begin anew, remove {run_dir / CHECKPOINTS}",
        )
    return None


def _require_alike(run_dir: Path, saved: Mapping[str, StoredTensor], mine: Mapping[str, Tensor]) -> None:
    theirs = {name: stored.shape for name, stored in saved.items()}
    here = {name: tuple(tensor.shape) for name, tensor in mine.items()}
    odd = sorted(name for name in theirs.keys() | here.keys() if theirs.get(name) != here.get(name))
    if odd:
        raise Refused(
            wrong=f"the checkpoints of {run_dir} hold other weights than this configuration trains",
            found=f"{len(odd)} tensors, first {odd[0]}: {theirs.get(odd[0])}, now {here.get(odd[0])}",
            mend="set `lora` back to what it was, or give another `out`",
        )


def _differing(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    odd = (name for name in mine if theirs.get(name) != mine[name])
    return ", ".join(f"{name} {theirs.get(name)}, now {mine[name]}" for name in odd)


def _restore_optimizers(state: TrainState, path: Path) -> None:
    """Of each rank only what it holds."""
    parameters = dict(state.student.named_parameters())
    mine = own_slots(state.optimizers)
    for key, stored in read_header(path).items():
        name, slot = key.rsplit(":", 1)
        if parameters[name] in mine:
            mine[parameters[name]][slot] = read_tensor(stored).to(parameters[name].device)


def _copied(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor.detach())
            for name, tensor in tensors}  # fmt: skip


def is_milestone(folder: Path, every: int | None) -> bool:
    if every is None:
        return False
    try:
        return bool(json.loads((folder / STATE_NAME).read_bytes())["step"] % every == 0)
    except (OSError, ValueError, KeyError, TypeError):
        return False
