"""How an expert's forwards are computed: by which attention kernels, and compiled or as they are written.

    kernels = choose_kernels(config, "cuda:0", torch.bfloat16, asks)     refused where this device cannot
    kernels.compile(expert)                    once a network; nothing where it is not wished
    with kernels.at_work(): expert(...)
    kernels.told                               "flash", or "flash+efficient" where torch's own choice differs by layer

Each shape is compiled for itself and nothing is measured while running: a micro-batch's numbers depend on its shape,
never on what came before it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import Refused
from harvest.config import TeacherConfig
from harvest.placing.places import Placement

BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
NAMES: dict[Any, str] = {backend.value: name for name, backend in BACKENDS.items()}
TRIED_TOKENS = 64
"""Of a call that only asks whether a kernel takes it: what it takes depends on types, head and bias."""
NO_LIMIT = 1 << 16
"""Of shapes that one block is compiled for: beyond torch's own limit of 8 it would silently not be compiled at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One kind of attention that a forward asks for."""

    rows: int
    queries: int
    keys: int
    heads: int
    dim: int
    biased: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    told: str
    """Attention back ends, as asked for or as torch chooses them: for the numerics."""
    backend: SDPBackend | None
    """None: torch's own choice."""
    is_compiled: bool

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        with contextlib.nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            yield

    def compile(self, network: Any) -> None:
        """The repeated block, once for all its copies; again it is nothing."""
        if self.is_compiled and not getattr(network, "_is_compiled_here", False):
            network.compile_repeated_blocks(dynamic=False)
            network._is_compiled_here = True


def choose_kernels(config: TeacherConfig, device: str, dtype: torch.dtype, asks: Sequence[Ask]) -> Kernels:
    if config.compile:
        _compile_by_shape_alone()
    if config.attention == "auto":
        return Kernels(told=_own_choice(device, dtype, asks), backend=None, is_compiled=config.compile)
    able = [name for name in BACKENDS if all(_can(BACKENDS[name], ask, device, dtype) for ask in asks)]
    if config.attention not in able:
        biased = any(ask.biased for ask in asks)
        raise Refused(
            wrong=f"teacher.attention: {config.attention} cannot compute this teacher's attention on {device}",
            found=f"{dtype}, heads of {', '.join(sorted({str(ask.dim) for ask in asks}))}"
            + (", a bias for the collapsed padding" if biased else ""),
            mend=f"use auto or one of {', '.join(able)}"
            + (", or set teacher.collapsed_padding: false" if biased and config.attention == "flash" else ""),
        )
    return Kernels(told=config.attention, backend=BACKENDS[config.attention], is_compiled=config.compile)


def require_compilable(config: TeacherConfig, placement: Placement) -> None:
    """Blocks that libraries' hooks move about while they compute cannot be one piece of code."""
    moved = [place.name for place in placement.places if place.how in ("stream", "split")]
    if config.compile and moved:
        raise Refused(
            wrong="teacher.compile wants networks that stay whole on one device",
            found=f"{', '.join(moved)}: {placement.strategy}",
            mend="set teacher.compile: false, or a teacher.placement of replicate, swap, gpu0 or cpu",
        )


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Everything as it is written."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _compile_by_shape_alone() -> None:
    """No kernel is chosen by a race against the clock, and none is given up for the number of shapes."""
    import torch._dynamo
    import torch._inductor.config

    torch._inductor.config.deterministic = True
    torch._dynamo.config.recompile_limit = NO_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = NO_LIMIT


@torch.inference_mode()
def _own_choice(device: str, dtype: torch.dtype, asks: Sequence[Ask]) -> str:
    chosen = [int(torch._fused_sdp_choice(*_made(ask, device, dtype))) for ask in asks]
    return "+".join(dict.fromkeys(NAMES.get(number, str(number)) for number in chosen))


@torch.inference_mode()
def _can(backend: SDPBackend, ask: Ask, device: str, dtype: torch.dtype) -> bool:
    small = Ask(rows=1, queries=min(ask.queries, TRIED_TOKENS), keys=min(ask.keys, TRIED_TOKENS), heads=ask.heads,
                dim=ask.dim, biased=ask.biased)  # fmt: skip
    query, key, value, bias = _made(small, device, dtype)
    try:
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    except RuntimeError:
        return False
    return True


def _made(ask: Ask, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key, value and bias as a layer makes them: heads are transposed out of the width."""

    def states(length: int) -> Tensor:
        return torch.zeros(ask.rows, length, ask.heads, ask.dim, device=device, dtype=dtype).transpose(1, 2)

    key = states(ask.keys)
    bias = torch.zeros(ask.rows, 1, 1, ask.keys, device=device, dtype=dtype) if ask.biased else None
    return states(ask.queries), key, key, bias
