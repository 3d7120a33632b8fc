"""Noise levels, what a network's output means at them, and the noise itself. Numpy; the conversions take any array.

A noisy state is x = (1 - sigma) x0 + sigma noise (rectified flow; Liu et al. 2209.03003, eq. 1), sigma from 1 to 0; a
network is fed the timestep t = 1000 sigma. Grids are named functions, because schedulers of the same name disagree:

    euler_grid         ours: sigma_i = shift(1 - i / N), optionally jittered within its stratum
    flow_match_grid    bitwise what diffusers' FlowMatchEulerDiscreteScheduler(shift) walks: it shifts its end twice
    unipc_grid         bitwise what UniPCMultistepScheduler(use_flow_sigmas) walks: it feeds integer timesteps
    vp_grid            a variance-preserving (Stable Diffusion) process in flow coordinates
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.record import Contract

Float32 = NDArray[np.float32]

HIGH_NOISE, LOW_NOISE = 0, 1
"""Record.expert: 0 = transformer, the high-noise one; 1 = transformer_2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The noise levels of one walk from noise to picture."""

    sigmas: Float32  # [N + 1], from 1 to 0
    timesteps: Float32  # [N], exactly as fed to the network
    scales: Float32 | None = None  # [N], what the network sees is scale x state; None: 1

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def at(self, step: int) -> tuple[np.float32, np.float32, np.float32]:
        """(sigma, the next sigma, scale) of a step."""
        scale = np.float32(1) if self.scales is None else self.scales[step]
        return self.sigmas[step], self.sigmas[step + 1], scale


def shifted(sigma: Any, shift: float) -> Any:
    """Time shift towards noise (Esser et al. 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshifted(sigma: Any, shift: float) -> Any:
    return sigma / (shift - (shift - 1) * sigma)


def euler_grid(
    num_steps: int,
    shift: float,
    *,
    train_steps: int = 1000,
    boundary: float | None = None,
    jitter_seed: int | None = None,
) -> Grid:
    """sigma_i = shift(u_i), u_i = 1 - i / N. With a seed, each inner u_i is drawn from its own stratum
    (half a step to both sides); an expert boundary is an edge of the strata, so the number of high-noise steps
    never depends on the draw. Sigma 1 and 0 are fixed."""
    u = 1 - np.arange(num_steps + 1, dtype=np.float64) / num_steps
    high = shifted(u, shift) >= boundary if boundary is not None else np.ones(num_steps + 1, bool)
    if jitter_seed is not None:
        edge = unshifted(boundary, shift) if boundary is not None else 0.0
        low_end = np.where(high, np.maximum(u - 0.5 / num_steps, edge), u - 0.5 / num_steps)
        high_end = np.where(high, u + 0.5 / num_steps, np.minimum(u + 0.5 / num_steps, edge))
        drawn = low_end + (high_end - low_end) * _generator(jitter_seed, stream=1).random(num_steps + 1)
        u[1:-1] = drawn[1:-1]
    timesteps = (shifted(u, shift) * train_steps).astype(np.float32)
    if boundary is not None:
        timesteps = _kept_on_its_side(timesteps, high, np.float64(boundary) * train_steps)
    return Grid(sigmas=timesteps / np.float32(train_steps), timesteps=timesteps[:-1])


def flow_match_grid(num_steps: int, shift: float, *, train_steps: int = 1000) -> Grid:
    smallest = shifted(np.float32(1) / np.float32(train_steps), shift).astype(np.float32)
    t = np.linspace(1.0 * train_steps, float(smallest) * train_steps, num_steps)
    sigmas = shifted(t / train_steps, shift).astype(np.float32)
    return Grid(sigmas=np.append(sigmas, np.float32(0)), timesteps=sigmas * np.float32(train_steps))


def unipc_grid(num_steps: int, shift: float, *, train_steps: int = 1000) -> Grid:
    sigmas = shifted(np.linspace(1, 1 / train_steps, num_steps + 1)[:-1], shift)
    sigmas[0] -= 1e-6 if abs(sigmas[0] - 1) < 1e-6 else 0.0
    fed = (sigmas * train_steps).astype(np.int64).astype(np.float32)
    return Grid(sigmas=np.append(sigmas, 0).astype(np.float32), timesteps=fed)


VP_SCHEDULES = {"linear": 1.0, "scaled_linear": 2.0}
"""Name -> the power in which its betas are linear."""


def vp_levels(schedule: str, beta_start: float, beta_end: float, train_steps: int) -> tuple[Any, Any]:
    """(a, b) of x = a x0 + b noise at each integer timestep of a variance-preserving process (Ho et al. 2006.11239);
    `scaled_linear` is linear in sqrt(beta), as Stable Diffusion has it."""
    power = VP_SCHEDULES[schedule]
    betas = np.linspace(beta_start ** (1 / power), beta_end ** (1 / power), train_steps, dtype=np.float64) ** power
    signal = np.cumprod(1 - betas)
    return np.sqrt(signal), np.sqrt(1 - signal)


def vp_grid(num_steps: int, levels: tuple[Any, Any], *, jitter_seed: int | None = None) -> Grid:
    """Integer timesteps spread from the last one down. In the coordinates y = x / (a + b), sigma = b / (a + b) the
    process is a rectified flow, and Euler's step there is DDIM's (Song et al. 2010.02502, eq. 12 with eta 0)."""
    a, b = levels
    u = 1 - np.arange(num_steps, dtype=np.float64) / num_steps
    if jitter_seed is not None:
        u[1:] += (_generator(jitter_seed, stream=1).random(num_steps - 1) - 0.5) / num_steps
    t = np.clip(np.rint(u * len(a)).astype(np.int64) - 1, 0, len(a) - 1)
    sigmas = np.append(b[t] / (a[t] + b[t]), 0.0)
    return Grid(
        sigmas=sigmas.astype(np.float32), timesteps=t.astype(np.float32), scales=(a[t] + b[t]).astype(np.float32)
    )


def contract_grid(contract: Contract, seed: int) -> Grid:
    """The grid that a record of a set walks."""
    if contract.solver != EULER:
        walk = GRIDS[FOLDER_SOLVERS[contract.solver.split()[0]]]
        return walk(contract.steps, contract.shift, train_steps=contract.train_steps)
    jitter_seed = seed if contract.jitter else None
    if contract.noise == "flow":
        steps, boundary = contract.train_steps, contract.boundary
        return euler_grid(contract.steps, contract.shift, train_steps=steps, boundary=boundary, jitter_seed=jitter_seed)
    _, schedule, start, end = contract.noise.split()
    levels = vp_levels(schedule, float(start), float(end), contract.train_steps)
    return vp_grid(contract.steps, levels, jitter_seed=jitter_seed)


EULER = "euler"
GRIDS = {EULER: euler_grid, "flow_match": flow_match_grid, "unipc": unipc_grid}
FOLDER_SOLVERS = {"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "flow_match"}
"""Contract.solver's first word -> the grid that it walks."""


def expert_of(timesteps: Any, boundary: float | None, *, train_steps: int = 1000) -> NDArray[np.uint8]:
    """Which expert serves each timestep: the first one at and above the boundary."""
    t = np.asarray(timesteps)
    if boundary is None:
        return np.full(t.shape, HIGH_NOISE, np.uint8)
    # A numpy scalar, not a Python float: the latter would be rounded to float32 before the comparison.
    return np.where(t >= np.float64(boundary) * train_steps, HIGH_NOISE, LOW_NOISE).astype(np.uint8)


def to_x0_noise(kind: str, prediction: Any, x: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """What a prediction (flow | epsilon | v | x0) says of x = a x0 + b noise. `flow` wants a + b = 1, `v` wants
    a^2 + b^2 = 1 (v = a noise - b x0; Salimans & Ho 2202.00512, appendix D)."""
    if kind == "flow":
        return x - b * prediction, x + a * prediction
    if kind == "epsilon":
        return (x - b * prediction) / a, prediction
    if kind == "v":
        return a * x - b * prediction, b * x + a * prediction
    return prediction, (x - a * prediction) / b


def seeded_noise(seed: int, shape: tuple[int, ...]) -> Float32:
    """The Gaussian that belongs to a seed, on any machine (Philox, float32): training can redraw it."""
    return _generator(seed, stream=0).standard_normal(shape, dtype=np.float32)


def renoise_noise(key: str, step: int, shape: tuple[int, ...]) -> Float32:
    """Fresh noise for one point of a record, another for each step."""
    return _generator(int(key, 16), stream=1000 + step).standard_normal(shape, dtype=np.float32)


def kept_steps(
    key: str, num_steps: int, num_kept: int, experts: NDArray[np.uint8], pinned: tuple[int, ...] = (0,)
) -> NDArray[np.int64]:
    """Which of its steps a record keeps: a draw from its key, the pinned ones and one of each expert for certain."""
    draw = _generator(int(key, 16), stream=2).permutation(num_steps)
    first_of_each = [
        next(int(i) for i in draw if experts[i] == expert)
        for expert in np.unique(experts)
        if not any(experts[i] == expert for i in pinned)
    ]
    wanted = list(dict.fromkeys([*pinned, *first_of_each, *map(int, draw)]))
    return np.array(sorted(wanted[:num_kept]), np.int64)


def pinned_points(contract: Contract, key: str) -> NDArray[np.int64] | None:
    """Which of a record's points are the steps that every record keeps; None: all of them, none was drawn."""
    pinned = sorted(set(contract.keep_at))
    if contract.keep in (contract.steps, len(pinned)):
        return None
    even = contract_grid(dataclasses.replace(contract, jitter=False), seed=0)  # jitter moves no step to another expert
    experts = expert_of(even.timesteps, contract.boundary, train_steps=contract.train_steps)
    kept = kept_steps(key, contract.steps, contract.keep, experts, contract.keep_at)
    return np.searchsorted(kept, pinned)


def _generator(seed: int, *, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed & 0xFFFF_FFFF_FFFF_FFFF, stream]))


def _kept_on_its_side(timesteps: Float32, high: NDArray[np.bool_], boundary: np.float64) -> Float32:
    """Rounding to float32 must not carry a step over the boundary."""
    edge = np.float32(boundary)
    at_or_above = edge if edge >= boundary else np.nextafter(edge, np.float32(np.inf))
    below = np.nextafter(at_or_above, np.float32(0))
    return np.where(high, np.maximum(timesteps, at_or_above), np.minimum(timesteps, below)).astype(np.float32)
