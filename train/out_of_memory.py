"""Whether a micro-batch fits the memory, and what to do when it does not.

    with explained(state, batch_size=32, world=world): ...       out of memory: a table of what held it, three mends
    batch_size = fitted(stepper, state, ...)                     fit: auto; halved until it fits on every rank
    with survived("pictures", log, said): ...                    out of memory, or a fault: said, and the run goes on

A smaller micro-batch at the same global batch is the same training, but for last bits.
"""

import contextlib
from collections.abc import Iterator

import torch

from common.errors import Fault, Partial
from common.log import Log, human_bytes
from common.record import Contract
from train.dist import World
from train.feed.data import Micro
from train.feed.order import Size
from train.objective import Objective
from train.optim import moments_to_come, own_slots
from train.state import TrainState
from train.step import Stepper

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def fitted(stepper: Stepper, state: TrainState, objective: Objective, contract: Contract, sizes: list[Size], *,
           batch_size: int, per_rank: int, world: World, log: Log) -> int:  # fmt: skip
    """The largest of batch_size, its half, ... that divides `per_rank`, at the largest picture and the longest text."""
    size = max(sizes, key=lambda sides: sides[0] * sides[1])
    asked, batch_size = batch_size, _divisor(per_rank, batch_size)
    with _reserved_for_optimizer(state):
        while not _goes(stepper, probe(objective, contract, size, batch_size, state.student.config.text_max_length)):
            if batch_size == 1:
                raise _fault(state, batch_size, world, "one sample alone does not fit")
            batch_size = _divisor(per_rank, batch_size // 2)
    batch_size = world.smallest(batch_size)
    if batch_size != asked:
        log.say(f"fit: auto takes batch_size {batch_size}, not {asked}; the global batch stays")
    return batch_size


@contextlib.contextmanager
def explained(state: TrainState, *, batch_size: int, world: World) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise _fault(state, batch_size, world, str(error).split("\n")[0]) from None


@contextlib.contextmanager
def survived(what: str, log: Log, said: set[str]) -> Iterator[None]:
    """A look at the student is not worth the run: without room for it, or without what it reads, it is left out, and
    that is said each time that it is new."""
    try:
        yield
    except (Fault, OSError, MemoryError, RuntimeError) as error:
        full = is_out_of_memory(error)
        if isinstance(error, RuntimeError) and not full:
            raise
        event = f"{what} left out" + (": out of memory" if full else "")
        if (new := event if full else f"{event} {error}") not in said:
            said.add(new)
            log.say(event, found=str(error).split("\n")[0])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """torch's own, and what its CPU allocator, the driver, cuBLAS and cuDNN say."""
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in told for words in OUT_OF_MEMORY)
    )


def probe(objective: Objective, contract: Contract, size: Size, batch_size: int, text_rows: int) -> Micro:
    """A micro-batch of zeros, as large as they come."""
    sides = [side // contract.latent_stride for side in size]
    dtype = getattr(torch, contract.storage_dtype.name)
    state = torch.zeros(batch_size, contract.latent_channels, *sides, dtype=dtype)
    text = torch.zeros(batch_size, text_rows, contract.text_dim, dtype=dtype)
    sigmas = torch.full((batch_size,), 0.5)
    times = sigmas * contract.train_steps
    ends = {"end": state, "end_sigmas": sigmas / 2, "end_timesteps": times / 2} if objective.spans else {}
    fields = dict.fromkeys(contract.point_fields, state)
    return Micro(timesteps=times, sigmas=sigmas, expert=torch.zeros(batch_size, dtype=torch.long), text=text,
                 lengths=torch.full((batch_size,), text_rows), inverse=torch.arange(batch_size),
                 **fields, **ends)  # fmt: skip


def _goes(stepper: Stepper, micro: Micro) -> bool:
    try:
        stepper.rehearse(micro)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True


@contextlib.contextmanager
def _reserved_for_optimizer(state: TrainState) -> Iterator[None]:
    """Moments are made at the first step: they must fit beside the activations."""
    held = [torch.empty_like(parameter) for parameter in moments_to_come(state.optimizers)]
    yield
    held.clear()


def _divisor(number: int, at_most: int) -> int:
    return next(candidate for candidate in range(min(number, max(1, at_most)), 0, -1) if number % candidate == 0)


def _fault(state: TrainState, batch_size: int, world: World, why: str) -> Partial:
    parts = held_bytes(state)
    peak = world.memory()["peak_bytes"]
    parts["activations and the rest"] = max(0, peak - sum(parts.values()))
    table = ", ".join(f"{name} {human_bytes(size)}" for name, size in parts.items())
    return Partial(
        wrong=f"out of memory with batch_size {batch_size}: {why}",
        found=table,
        mend=f"batch_size: {max(1, batch_size // 2)} with the same global_batch (or fit: auto); "
        "gradient_checkpointing: true; ema_on_host: true",
    )


def held_bytes(state: TrainState) -> dict[str, int]:
    """What lies on the student's own device."""
    device = next(state.student.parameters()).device
    parameters = list(state.student.parameters())
    moments = [slot for slots in own_slots(state.optimizers).values() for slot in slots.values()]
    return {
        "weights": sum(parameter.nbytes for parameter in parameters),
        "gradients": sum(parameter.nbytes for parameter in parameters if parameter.requires_grad),
        "optimizer": sum(slot.nbytes for slot in moments if isinstance(slot, torch.Tensor) and slot.device == device),
        "EMA": sum(average.nbytes for average in state.ema.values() if average.device == device),
    }
