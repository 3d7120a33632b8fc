"""What a student is asked: guidance, other teachers' predictions turned into velocities, segments of a path."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from common.errors import BadUsage, Refused
from common.record import Contract, Record
from common.schedule import contract_grid, expert_of, kept_steps, vp_levels
from tests.made import made_contract, made_record, predicted_from
from train.config import TrainConfig
from train.feed.data import Micro
from train.feed.slots import FINAL
from train.held_out import micro_of
from train.loss import NUM_LEVELS, level_weights, levels_of
from train.objective import fed, objective_of

NOWHERE = Path("nowhere")


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(set=NOWHERE, init=NOWHERE, out=NOWHERE, **changes)


def micro(contract: Contract, records: list[Record], spans: Any = None) -> Any:
    points = range(contract.keep) if spans is None else [begin for begin, _ in spans]
    return micro_of([(record, point) for record in records for point in points], spans, text_rows=9)


def whole_path(**changes: Any) -> Contract:
    return made_contract(jitter=False, steps=8, keep=8, encoding="float32", latent_dtype="float32", **changes)


def walked(number: int, contract: Contract) -> tuple[Record, np.ndarray]:
    """A record whose states lie on a curved path, and that path: [steps + 1, C, H, W]."""
    record = made_record(number, contract)
    grid = contract_grid(contract, seed=0)
    curve = np.stack([np.full(record.final.shape, sigma**2 + number, np.float32) for sigma in grid.sigmas])
    object.__setattr__(record, "latents", curve[:-1])
    object.__setattr__(record, "final", curve[-1])
    object.__setattr__(record, "sigmas", grid.sigmas[:-1])
    object.__setattr__(record, "timesteps", grid.timesteps)
    return record, curve


def test_each_expert_is_guided_by_its_own_w() -> None:
    contract = made_contract(guidance=(4.0, 3.0))
    record = made_record(1, contract)
    for asked, w in ((None, (4.0, 3.0)), ((2.0, 5.0), (2.0, 5.0)), ((1.0, 1.0), (1.0, 1.0))):
        question = objective_of(config(guidance=asked), contract).ask(micro(contract, [record]))
        weight = np.array(w, np.float32)[record.expert][:, None, None, None]
        cond, uncond = record.cond.astype(np.float32), record.uncond.astype(np.float32)
        np.testing.assert_allclose(question.target, uncond + weight * (cond - uncond), rtol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v", "x0"])
def test_whatever_the_teacher_predicts_the_student_is_asked_for_a_velocity(kind: str) -> None:
    """x0 and noise are known: the answer is their difference, at the flow's own state and time."""
    contract = made_contract(prediction=kind, noise="vp scaled_linear 0.00085 0.012", boundary=None, guidance=(1.0,),
                             encoding="float32", latent_dtype="float32")  # fmt: skip
    record = made_record(3, contract)
    a, b = vp_levels("scaled_linear", 0.00085, 0.012, contract.train_steps)
    rng = np.random.default_rng(0)
    x0, noise = (rng.standard_normal(record.latents.shape).astype(np.float32) for _ in range(2))
    times = np.array([900, 20])
    column_a, column_b = (level[times].astype(np.float32)[:, None, None, None] for level in (a, b))
    object.__setattr__(record, "timesteps", times.astype(np.float32))
    object.__setattr__(record, "sigmas", (b[times] / (a[times] + b[times])).astype(np.float32))
    object.__setattr__(record, "latents", column_a * x0 + column_b * noise)
    object.__setattr__(record, "expert", np.zeros(2, np.uint8))
    object.__setattr__(record, "cond", predicted_from(kind, x0, noise, column_a, column_b))
    question = objective_of(config(), contract).ask(micro(contract, [record]))
    sigma = record.sigmas[:, None, None, None]
    np.testing.assert_allclose(question.latents, (1 - sigma) * x0 + sigma * noise, atol=1e-5)
    np.testing.assert_allclose(question.target, noise - x0, atol=2e-4)
    np.testing.assert_allclose(question.timesteps, 1000 * record.sigmas, rtol=1e-6)


def test_a_flow_teachers_words_are_passed_on_as_they_are() -> None:
    contract = made_contract()
    seen = micro(contract, [made_record(1, contract)])
    question = objective_of(config(), contract).ask(seen)
    assert torch.equal(question.latents, seen.latents.float()) and question.timesteps is seen.timesteps


@pytest.mark.parametrize("num", [1, 3, 4, 8])
def test_a_perfect_student_of_segments_walks_from_noise_to_the_end_point(num: int) -> None:
    contract = whole_path()
    objective = objective_of(config(objective="segment", segments=num), contract)
    assert objective.spans is not None and objective.spans[0][0] == 0 and objective.spans[-1][1] == FINAL
    record, curve = walked(2, contract)
    question = objective.ask(micro(contract, [record], objective.spans))
    grid = objective.grid(None)
    assert grid.num_steps == num
    state = torch.from_numpy(curve[0])
    for step in range(num):
        np.testing.assert_array_equal(question.timesteps[step], grid.timesteps[step])
        np.testing.assert_allclose(question.latents[step], state, atol=1e-5)
        state = state + float(grid.sigmas[step + 1] - grid.sigmas[step]) * question.target[step]
    np.testing.assert_allclose(state, curve[-1], atol=1e-5)


@pytest.mark.parametrize(("changes", "of_contract", "fault", "what"), [
    ({"guidance": (9.0, 9.0)}, {}, Refused, "another w than the set's"),
    ({"segments": 9}, {}, Refused, "8 points a record"),
    ({}, {"source": "renoise"}, Refused, "source: trajectory"),
    ({}, {"keep": 4, "keep_at": (0,)}, Refused, "keep_at: [0, 2, 4, 6]"),
    ({}, {"keep": 2, "keep_at": (1, 4)}, Refused, "noise first"),
    ({"objective": "output", "segments": 4}, {}, BadUsage, "remove it"),
    ({"objective": "output", "guidance": (1.0,)}, {}, BadUsage, "2 experts"),
])  # fmt: skip
def test_a_wish_that_the_set_cannot_meet_is_refused(
    changes: dict[str, Any], of_contract: dict[str, Any], fault: type[Exception], what: str
) -> None:
    contract = made_contract(**({"steps": 8, "keep": 8} | of_contract))
    with pytest.raises(fault) as raised:
        objective_of(config(**({"objective": "segment"} | changes)), contract)
    assert what in str(raised.value)


def test_a_student_of_segments_takes_no_other_number_of_steps() -> None:
    objective = objective_of(config(objective="segment", segments=4), whole_path())
    with pytest.raises(Refused, match="4 segments"):
        objective.grid(20)


@pytest.mark.parametrize("odd", [{"level_shares": (0.0,) * 4}, {"level_shares": (float("inf"), 1.0, 1.0, 1.0)},
                                 {"betas": (0.9, 1.5)}, {"lr": float("inf")}, {"guidance": ()},
                                 {"guidance": (float("nan"), 1.0)}])  # fmt: skip
def test_numbers_that_cannot_be_meant_are_refused(odd: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(odd))):
        config(**odd)


@pytest.mark.parametrize("steps", [8, 40])
def test_shares_hold_where_levels_are_jittered(steps: int) -> None:
    """Jitter carries steps over the edges of the quarters."""
    contract = made_contract(jitter=True, steps=steps, keep=steps // 2, keep_at=(0,), shift=3.0)
    shares = (0.25, 0.25, 0.25, 0.25)
    weights = level_weights(shares, contract, None)
    assert weights is not None
    sums = torch.zeros(NUM_LEVELS)
    for number in range(4000):
        key = made_record(number, side=8).key
        grid = contract_grid(contract, int(key, 16))
        experts = expert_of(grid.timesteps, contract.boundary)
        kept = kept_steps(key, contract.steps, contract.keep, experts, contract.keep_at)
        level = levels_of(torch.from_numpy(grid.sigmas[:-1][kept]))
        sums.index_add_(0, level, weights[level])
    torch.testing.assert_close(sums / sums.sum(), torch.tensor(shares), rtol=0.03, atol=0)


@pytest.mark.parametrize("asked", ["output", "segment"])
def test_a_student_is_told_1000_sigma_whatever_the_teacher_was_fed(asked: str) -> None:
    """A folder's UniPC feeds integers; the exported scheduler tells sigma."""
    solver = 'UniPCMultistepScheduler {"use_flow_sigmas": true}'
    contract = made_contract(steps=8, keep=8, keep_at=(), jitter=False, solver=solver, boundary=None, guidance=(4.0,))
    grid = contract_grid(contract, seed=0)
    assert (grid.timesteps != grid.sigmas[:-1] * 1000).any()
    objective = objective_of(config(objective=asked), contract)
    assert np.array_equal(objective.grid(None).timesteps, objective.grid(None).sigmas[:-1] * np.float32(1000))
    batch = SimpleNamespace(timesteps=torch.from_numpy(grid.timesteps), sigmas=torch.from_numpy(grid.sigmas[:-1]))
    assert torch.equal(fed(contract, cast(Micro, batch)), batch.sigmas * 1000)


def test_a_student_of_a_vp_teacher_walks_the_levels_that_it_learned() -> None:
    contract = made_contract(prediction="epsilon", noise="vp1 scaled_linear 0.00085 0.012", boundary=None,
                             guidance=(1.0,), steps=30, keep=4)  # fmt: skip
    grid = objective_of(config(), contract).grid(10)
    levels = contract_grid(dataclasses.replace(contract, steps=10, jitter=False), seed=0)
    assert np.array_equal(grid.sigmas, levels.sigmas) and grid.sigmas[0] < 0.95


def test_shares_of_the_loss_do_not_depend_on_the_harvests_density() -> None:
    """With the shift most points are noisy ones; weighted, each quarter has what was asked for."""
    contract = made_contract(jitter=False, steps=40, keep=40, shift=5.0)
    sigmas = torch.from_numpy(contract_grid(contract, seed=0).sigmas[:-1])
    shares = (0.4, 0.3, 0.2, 0.1)
    weights = level_weights(shares, contract, None)
    assert weights is not None
    by_level = torch.zeros(NUM_LEVELS).index_add_(0, levels_of(sigmas), weights[levels_of(sigmas)])
    torch.testing.assert_close(by_level / len(sigmas), torch.tensor(shares))
    few = made_contract(jitter=False, steps=2, keep=2, shift=12.0)
    with pytest.raises(Refused, match="level_shares"):
        level_weights(shares, few, None)
