"""What a run needs to go on as if nothing had happened, and its way to the disk and back.

    save_checkpoint(run_dir, state, facts, keep=2)          run/checkpoints/<samples_seen>/: appears whole or not at all
    facts = restore(run_dir, state, log)                    the newest valid one; an older one if that is damaged

Safetensors and JSON only. state.json holds size and crc32c of each file; a checkpoint that does not match is passed
over and said so. An older checkpoint is removed only after the newer one was read back.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from common.errors import Corrupt
from common.extents import crc32c
from common.files import sweep, write_folder
from common.log import Log
from train.run_folder import CHECKPOINTS, EMA_NAME, MODEL_NAME, OPTIMIZER_NAME, STATE_NAME, checkpoints
from train.student import WanLite


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Everything that a step changes."""

    student: WanLite
    ema: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    samples_seen: int = 0
    step: int = 0
    cursor: dict[str, list[int]] | None = None
    epoch: int = 0


def save_checkpoint(run_dir: Path, state: TrainState, facts: Mapping[str, Any], *, keep: int) -> Path:
    """Write a checkpoint, read it back, then remove those beyond `keep`."""
    files = {
        MODEL_NAME: save(_plain(state.student.state_dict())),
        EMA_NAME: save(_plain(state.ema)),
        OPTIMIZER_NAME: save(_optimizer_tensors(state)),
    }
    summary = {
        "samples_seen": state.samples_seen,
        "step": state.step,
        "epoch": state.epoch,
        "cursor": state.cursor,
        **facts,
        "files": {name: [len(data), crc32c(data)] for name, data in files.items()},
    }
    folder = run_dir / CHECKPOINTS / f"{state.samples_seen:012d}"
    if folder.exists():  # a damaged one that was passed over: its successor takes its place
        shutil.rmtree(folder)
    write_folder(folder, {**files, STATE_NAME: json.dumps(summary, indent=1).encode()})
    read_checkpoint(folder)
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    sweep(run_dir / CHECKPOINTS, older_than_s=3600.0)
    return folder


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """state.json and the files, each checked against it."""
    try:
        summary: dict[str, Any] = json.loads((folder / STATE_NAME).read_bytes())
        files = {name: (folder / name).read_bytes() for name in summary["files"]}
        for name, data in files.items():
            if [len(data), crc32c(data)] != summary["files"][name]:
                raise ValueError(f"{name}: {len(data)} bytes, crc32c {crc32c(data):08x}")
    except (OSError, ValueError, KeyError) as error:
        raise Corrupt(wrong=f"checkpoint {folder} is damaged", found=str(error), mend="use the one before") from None
    return summary, files


def restore(run_dir: Path, state: TrainState, log: Log) -> dict[str, Any] | None:
    """Fill `state` from the newest valid checkpoint; its facts, or None when there is none."""
    for folder in reversed(checkpoints(run_dir)):
        try:
            summary, files = read_checkpoint(folder)
        except Corrupt as fault:
            log.say(f"passing over {fault}")
            continue
        state.student.load_state_dict(load(files[MODEL_NAME]), strict=True)
        for name, tensor in load(files[EMA_NAME]).items():
            state.ema[name].copy_(tensor)
        _restore_optimizer(state, load(files[OPTIMIZER_NAME]))
        state.samples_seen, state.step = summary["samples_seen"], summary["step"]
        state.cursor, state.epoch = summary["cursor"], summary["epoch"]
        log.say(f"resumed from {folder.name}", step=state.step, epoch=state.epoch)
        return summary
    return None


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """`<parameter>:<slot>`, by the parameters' names: independent of their order in the optimizer."""
    names = {id(parameter): name for name, parameter in state.student.named_parameters()}
    return {
        f"{names[id(parameter)]}:{slot}": torch.as_tensor(value).detach().cpu().contiguous()
        for parameter, slots in state.optimizer.state.items()
        for slot, value in slots.items()
    }


def _restore_optimizer(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    parameters = dict(state.student.named_parameters())
    for key, tensor in tensors.items():
        name, slot = key.rsplit(":", 1)
        parameter = parameters[name]
        home = "cpu" if slot == "step" and parameter.device.type == "cpu" else parameter.device
        state.optimizer.state[parameter][slot] = tensor.to(home)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
