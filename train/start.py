"""A student and its state as a run begins, before a checkpoint says otherwise.

student = first_student(config)                   as `train init` left it; told the guidance, if it is drawn
student = open_student(config, contract)          the same, if it fits the set, with what is not trained held fast
state = new_state(student, config, world)
"""

from typing import Any

import torch

from common.errors import BadUsage, Refused
from common.record import Contract
from train.config import GuidanceRange, TrainConfig, lies_in
from train.dist import World
from train.lora import adapt
from train.optim import make_optimizers
from train.state import TrainState
from train.student.guidance import hearing
from train.student.network import WEIGHTS_NAME, WanLite, load_student


def first_student(config: TrainConfig, **switches: Any) -> WanLite:
    student = load_student(config.init, **switches)
    if isinstance(config.guidance, GuidanceRange):
        if config.lora is not None and not student.config.guidance_embeds:
            raise BadUsage(wrong="lora with guidance: {low, high}", found="an init that is told no guidance",
                           mend="adapters cannot learn to hear it: train without lora first, and export it as the "
                           "next run's init (--format wanlite)")  # fmt: skip
        return hearing(student)
    if student.config.guidance_embeds:
        raise BadUsage(wrong="guidance", found="one w for an init that is told of it",
                       mend="guidance: {low: ..., high: ...}, or export that student with --guidance W")  # fmt: skip
    return student


def open_student(config: TrainConfig, contract: Contract) -> WanLite:
    """Refused where it does not fit the set."""
    if not (config.init / WEIGHTS_NAME).exists():
        raise BadUsage(
            wrong="there is no student to start from",
            found=f"nothing in {config.init}",
            mend=f"python -m train init --teacher DIR --student configs/students/NAME.json --out {config.init}",
        )
    student = first_student(config, gradient_checkpointing=config.gradient_checkpointing)
    _require_fit(student, contract)
    if config.lora is not None:
        if config.frozen:
            raise BadUsage(wrong="frozen and lora together", found=f"frozen: {list(config.frozen)}",
                           mend="frozen: []; adapters alone are trained, where lora.targets says")  # fmt: skip
        if config.muon is not None:
            raise BadUsage(wrong="muon and lora together", found=f"lora.rank: {config.lora.rank}",
                           mend="muon: null, for adapters are thin factors, not matrices of their own")  # fmt: skip
        adapt(student, config.lora, seed=config.seed)
    _freeze(student, config.frozen)
    _require_taught(student, config)
    return student


def _require_fit(student: WanLite, contract: Contract) -> None:
    wants = {
        "num_channels": (student.config.in_channels, contract.latent_channels),
        "text_encoder_output_dim": (student.config.text_dim, contract.text_dim),
        "text_padded_length": (student.config.text_length, contract.text_length),
    }
    for name, (number, wanted) in wants.items():
        if number != wanted:
            raise Refused(
                wrong=f"the student does not fit the set: {name}",
                found=f"{number}, the set has {wanted}",
                mend=f"set {name} to {wanted} in the student's JSON and run train init again with --set SET, or with "
                "--adapt too, which does that",
            )


def _freeze(student: WanLite, frozen: tuple[str, ...]) -> None:
    for part in frozen:
        held = [parameter for name, parameter in student.named_parameters() if lies_in(name, part)]
        if not held:
            names = sorted({name.split(".")[0] for name, _ in student.named_parameters()})
            raise BadUsage(wrong=f"frozen: no parameter is or lies in '{part}'", found=", ".join(names),
                           mend="name one of these, or blocks.N")  # fmt: skip
        for parameter in held:
            parameter.requires_grad_(False)


def _require_taught(student: WanLite, config: TrainConfig) -> None:
    taught = {name: parameter.shape for name, parameter in student.named_parameters() if parameter.requires_grad}
    if not taught:
        raise BadUsage(wrong="frozen: nothing is left to train", found=", ".join(config.frozen), mend="leave one away")
    if config.muon is not None and not any(config.by_muon(name, shape) for name, shape in taught.items()):
        raise BadUsage(wrong="muon: nothing is left to it", found=f"frozen: {', '.join(config.frozen)}",
                       mend="muon: null, or leave one away")  # fmt: skip


def new_state(student: WanLite, config: TrainConfig, world: World) -> TrainState:
    """What a checkpoint holds of a student with adapters is these alone. The first rank saves and shows the average,
    so that the others keep none."""
    home = torch.device("cpu") if config.ema_on_host else world.device
    kept = {name: parameter for name, parameter in student.named_parameters()
            if parameter.requires_grad or config.lora is None}  # fmt: skip
    averaged = kept if world.rank == 0 else {}
    ema = {name: parameter.detach().to(home, copy=True) for name, parameter in averaged.items()}
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "float16")
    optimizers = make_optimizers(student, config, num_ranks=world.size)
    return TrainState(student=student, kept=tuple(kept), ema=ema, optimizers=optimizers, scaler=scaler)
