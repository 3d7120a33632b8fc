"""Grids, conversions and noise: identities, and bit equality with the schedulers they are named after."""

import hashlib

import numpy as np
import pytest

from common.schedule import (
    GRIDS,
    euler_grid,
    expert_of,
    flow_match_grid,
    kept_steps,
    seeded_noise,
    shifted,
    to_x0_noise,
    unipc_grid,
    unshifted,
    vp_grid,
    vp_levels,
)
from tests.made import predicted_from

STEPS = [1, 4, 20, 37, 40, 50]
SHIFTS = [1.0, 3.0, 5.5, 12.0]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_named_grids_are_their_schedulers_bitwise(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    pairs = [
        (FlowMatchEulerDiscreteScheduler(shift=shift), flow_match_grid),
        (
            UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift),
            unipc_grid,
        ),
    ]
    for scheduler, make in pairs:
        scheduler.set_timesteps(steps)
        grid = make(steps, shift)
        np.testing.assert_array_equal(grid.sigmas, scheduler.sigmas.numpy())
        np.testing.assert_array_equal(grid.timesteps, scheduler.timesteps.numpy().astype(np.float32))


@pytest.mark.parametrize("name", GRIDS)
def test_grids_fall_from_noise_to_picture(name: str) -> None:
    grid = GRIDS[name](20, 12.0)
    assert grid.sigmas.dtype == grid.timesteps.dtype == np.float32
    assert grid.sigmas[0] == pytest.approx(1, abs=2e-6) and grid.sigmas[-1] == 0
    assert (np.diff(grid.sigmas) < 0).all() and grid.num_steps == 20


def test_wan_walks_26_of_40_steps_in_the_high_noise_expert() -> None:
    grid = euler_grid(40, 12.0, boundary=0.875)
    assert (expert_of(grid.timesteps, 0.875) == 0).sum() == 26


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("boundary", [0.5, 0.875, 0.9, 0.417])
def test_jitter_never_crosses_the_boundary_and_keeps_the_order(shift: float, boundary: float) -> None:
    plain = expert_of(euler_grid(24, shift, boundary=boundary).timesteps, boundary)
    drawn = [euler_grid(24, shift, boundary=boundary, jitter_seed=seed) for seed in range(300)]
    for grid in drawn:
        np.testing.assert_array_equal(expert_of(grid.timesteps, boundary), plain)
        assert (np.diff(grid.sigmas) < 0).all() and grid.sigmas[0] == 1 and grid.sigmas[-1] == 0
    assert np.std([grid.sigmas[7] for grid in drawn]) > 0


def test_a_timestep_on_the_boundary_is_high_noise() -> None:
    edge = np.float32(875.0)
    assert expert_of([edge, np.nextafter(edge, np.float32(0))], 0.875).tolist() == [0, 1]


@pytest.mark.parametrize("shift", SHIFTS)
def test_shift_has_its_inverse(shift: float) -> None:
    sigma = np.linspace(0, 1, 101)
    np.testing.assert_allclose(unshifted(shifted(sigma, shift), shift), sigma, atol=1e-14)


@pytest.mark.parametrize(("kind", "a", "b"), [("flow", 0.3, 0.7), ("epsilon", 0.6, 0.8), ("v", 0.6, 0.8),
                                              ("x0", 0.3, 0.7)])  # fmt: skip
def test_predictions_convert_there_and_back(kind: str, a: float, b: float) -> None:
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 50))
    x = a * x0 + b * noise
    prediction = predicted_from(kind, x0, noise, a, b)
    found_x0, found_noise = to_x0_noise(kind, prediction, x, a, b)
    np.testing.assert_allclose(found_x0, x0, atol=1e-12)
    np.testing.assert_allclose(found_noise, noise, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [5, 20])
def test_eulers_step_in_flow_coordinates_is_ddims(kind: str, steps: int) -> None:
    """On a variance-preserving process, with a network that knows nothing, against diffusers' own scheduler."""
    import torch
    from diffusers import DDIMScheduler

    levels = vp_levels("scaled_linear", 0.00085, 0.012, 1000)
    grid = vp_grid(steps, levels)
    name = {"epsilon": "epsilon", "v": "v_prediction"}[kind]
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                              prediction_type=name, timestep_spacing="trailing", set_alpha_to_one=True)  # fmt: skip
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(grid.timesteps, scheduler.timesteps.numpy())
    rng = np.random.default_rng(0)
    sigma, _, scale = grid.at(0)
    x = torch.from_numpy(rng.standard_normal(50)).double()
    state = x.numpy() / scale
    for step in range(steps):
        sigma, after, scale = map(float, grid.at(step))
        said = rng.standard_normal(50)
        x0, noise = to_x0_noise(kind, said, scale * state, scale * (1 - sigma), scale * sigma)
        state = state + (after - sigma) * (noise - x0)
        x = scheduler.step(torch.from_numpy(said), int(grid.timesteps[step]), x, eta=0.0).prev_sample
    np.testing.assert_allclose(state, x.numpy(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("seed", range(20))
def test_vp_grids_fall_and_stay_within(seed: int) -> None:
    grid = vp_grid(30, vp_levels("scaled_linear", 0.00085, 0.012, 1000), jitter_seed=seed)
    assert (np.diff(grid.sigmas) < 0).all() and (np.diff(grid.timesteps) < 0).all()
    assert grid.timesteps[0] == 999 and grid.timesteps[-1] >= 0 and grid.sigmas[-1] == 0


def test_noise_is_the_same_on_every_machine() -> None:
    """A golden hash: a set's noise can be redrawn years later, or numpy has changed and we want to know."""
    noise = seeded_noise(1234567890123456789, (16, 8, 8))
    assert noise.dtype == np.float32
    assert hashlib.sha256(noise.tobytes()).hexdigest()[:16] == "86eac3936b79b6ce"
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1


def test_seeds_draw_different_noise() -> None:
    drawn = {seeded_noise(seed, (4,)).tobytes() for seed in range(1000)}
    assert len(drawn) == 1000


def test_kept_steps_hold_the_pinned_ones_and_both_experts() -> None:
    experts = expert_of(euler_grid(40, 12.0, boundary=0.875).timesteps, 0.875)
    for number in range(300):
        kept = kept_steps(f"{number:016x}", 40, 3, experts, (0, 39))
        assert len(kept) == 3 and {0, 39} <= set(kept) and (np.diff(kept) > 0).all()
        assert set(experts[kept]) == {0, 1}
    assert set(experts[kept_steps("00000000000000ff", 40, 2, experts)]) == {0, 1}


def test_every_step_is_kept_about_equally_often() -> None:
    experts = np.zeros(10, np.uint8)
    counts = np.zeros(10)
    for number in range(4000):
        counts[kept_steps(f"{number * 7919:016x}", 10, 4, experts, ())] += 1
    assert (np.abs(counts / 4000 - 0.4) < 0.04).all()
