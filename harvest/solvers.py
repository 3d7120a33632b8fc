"""How a state goes on from one noise level to the next. One solver a micro-batch: it may remember earlier steps.

    solver = solver_of(contract)
    state = solver(step)

euler      in flow coordinates, with each record's own levels; on a variance-preserving process it is DDIM's step
checkpoint the scheduler that the teacher's folder brings, at the levels that it names itself
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from common.errors import Refused
from common.record import Contract
from common.schedule import EULER, FOLDER_SOLVERS, contract_grid, to_x0_noise

if TYPE_CHECKING:
    from torch import Tensor

SHIFT_NAMES = ("flow_shift", "shift")
"""What schedulers call it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a micro-batch; levels are columns [B, 1, 1, 1]."""

    state: "Tensor"  # [B, C, H, W]
    fed: "Tensor"  # [B, C, H, W], what the teacher saw
    guided: "Tensor"  # [B, C, H, W]
    sigma: "Tensor"
    after: "Tensor"
    scale: "Tensor"
    timestep: float
    """Of the first record: of all of them where levels are not drawn."""


class Solver(Protocol):
    def __call__(self, step: Step) -> "Tensor":
        """The next state [B, C, H, W]."""


@dataclass(frozen=True, slots=True)
class Euler:
    """Along the velocity that the prediction means."""

    prediction: str

    def __call__(self, step: Step) -> "Tensor":
        velocity = step.guided
        if self.prediction != "flow":
            scale, sigma = step.scale, step.sigma
            x0, noise = to_x0_noise(self.prediction, step.guided, step.fed, scale * (1 - sigma), scale * sigma)
            velocity = noise - x0
        return step.state + (step.after - step.sigma) * velocity


class Checkpoint:
    """diffusers' own scheduler, set up as its folder says."""

    def __init__(self, contract: Contract) -> None:
        self._scheduler = _scheduler_of(contract)
        self._scheduler.set_timesteps(contract.steps)
        self._timesteps = {float(t): t for t in self._scheduler.timesteps}
        grid = contract_grid(contract, seed=0)
        walked = self._scheduler.timesteps.numpy().astype(np.float32), self._scheduler.sigmas.numpy()
        if not all(map(np.array_equal, walked, (grid.timesteps, grid.sigmas))):
            raise Refused(
                wrong="the folder's scheduler walks another grid than its class is known for",
                found=f"{contract.solver[:60]}..., timesteps {walked[0][:3].tolist()}...",
                mend="set solver: euler",
            )

    def __call__(self, step: Step) -> "Tensor":
        t = self._timesteps[step.timestep]
        state: Tensor = self._scheduler.step(step.guided, t, step.state, return_dict=False)[0]
        return state


def solver_of(contract: Contract) -> Solver:
    return Euler(contract.prediction) if contract.solver == EULER else Checkpoint(contract)


def require_known(scheduler: str) -> None:
    """Before anything is loaded: a folder's scheduler that we can walk and name."""
    name = scheduler.split()[0]
    if name not in FOLDER_SOLVERS:
        raise Refused(
            wrong="solver: checkpoint does not know the folder's scheduler",
            found=name,
            mend=f"set solver: euler; known are {', '.join(FOLDER_SOLVERS)}",
        )


def _scheduler_of(contract: Contract) -> Any:
    import diffusers

    name, told = contract.solver.split(" ", 1)
    settings = json.loads(told)
    settings |= {known: contract.shift for known in SHIFT_NAMES if known in settings}
    return getattr(diffusers, name).from_config(settings)
