"""DDPM and DDIM on distributions whose noise prediction is known in closed form; upstream's step spacing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditmoe_cli.diffusion.forward_process import respaced_schedule, sampling_schedule
from ditmoe_cli.diffusion.schedule import ancestral_timesteps, ddim_timesteps
from ditmoe_cli.diffusion.solvers import ancestral, ddim

Predict = Callable[[Tensor, float], Tensor]
SHAPE = (2, 3, 4, 4)
MEAN, SPREAD = 0.7, 0.4
ALPHAS_BAR = [1.0]
for _i in range(1000):
    ALPHAS_BAR.append(ALPHAS_BAR[-1] * (1 - (1e-4 + (2e-2 - 1e-4) * _i / 999)))
ALPHAS_BAR = ALPHAS_BAR[1:]


def noise(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def point_eps(z: Tensor, t: float) -> Tensor:
    """The noise in z if all images are MEAN everywhere."""
    a = ALPHAS_BAR[int(t)]
    return (z - math.sqrt(a) * MEAN) / math.sqrt(1 - a)


def gaussian_eps(z: Tensor, t: float) -> Tensor:
    """E[noise | z] for images N(MEAN, SPREAD²)."""
    a = ALPHAS_BAR[int(t)]
    return math.sqrt(1 - a) * (z - math.sqrt(a) * MEAN) / (a * SPREAD**2 + 1 - a)


def by_ddim(predict: Predict, z: Tensor, steps: int) -> Tensor:
    return ddim(predict, z, sampling_schedule("ddim", steps))


def by_ancestral(predict: Predict, z: Tensor, steps: int, fresh: Callable[[Tensor], Tensor]) -> Tensor:
    return ancestral(predict, z, sampling_schedule("ddpm", steps), fresh)


# ------------------------------------------------------------------ steps and schedules


def space_timesteps(count: int) -> list[int]:
    """The spacing of improved-diffusion for one section, by accumulation as there."""
    stride = 1.0 if count <= 1 else 999 / (count - 1)
    position, found = 0.0, []
    for _ in range(count):
        found.append(round(position))
        position += stride
    return found


@pytest.mark.parametrize("steps", [*range(2, 60), 100, 125, 200, 250, 333, 500, 777, 999, 1000])
def test_ancestral_steps_are_upstreams(steps: int) -> None:
    assert ancestral_timesteps(steps) == space_timesteps(steps)


def test_documented_step_lists() -> None:
    assert ancestral_timesteps(10) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert ancestral_timesteps(4) == [0, 333, 666, 999]
    assert ancestral_timesteps(1000) == list(range(1000))
    assert ddim_timesteps(10) == list(range(0, 1000, 100))
    assert ddim_timesteps(50) == list(range(0, 1000, 20))
    assert ddim_timesteps(250) == list(range(0, 1000, 4))
    assert ddim_timesteps(3) == [0, 334, 668], "a stride of 333 would give four"
    assert ddim_timesteps(1000) == list(range(1000))
    assert ddim_timesteps(300)[:4] == [0, 3, 6, 10], "no stride gives 300 steps"
    assert ddim_timesteps(300)[-1] == 996


@given(steps=st.integers(1, 1000))
def test_ddim_steps_take_the_smallest_stride_that_fits(steps: int) -> None:
    found = ddim_timesteps(steps)
    assert len(found) == steps
    assert found[0] == (0 if steps > 1 else 999)
    assert found[-1] <= 999
    gaps = {b - a for a, b in itertools.pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    fitting = [s for s in range(1, 1000) if len(range(0, 1000, s)) == steps]
    if fitting and steps > 1:
        assert gaps == {fitting[0]}
    elif steps > 1:
        assert 1000 - found[-1] <= 1000 // steps + 1, "the last step is as near to noise as the others are apart"


def test_betas_are_linear_over_a_thousand_steps() -> None:
    schedule = respaced_schedule(list(range(1000)))
    expected = [1e-4 + (2e-2 - 1e-4) * i / 999 for i in range(1000)]
    torch.testing.assert_close(schedule.betas, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(schedule.alphas_bar, torch.tensor(ALPHAS_BAR, dtype=torch.float64))


@given(steps=st.integers(1, 1000), spacing=st.sampled_from([ancestral_timesteps, ddim_timesteps]))
def test_respaced_schedules_keep_the_noise_level_of_their_steps(steps: int, spacing: object) -> None:
    timesteps = ancestral_timesteps(steps) if spacing is ancestral_timesteps else ddim_timesteps(steps)
    schedule = respaced_schedule(timesteps)
    expected = torch.tensor([ALPHAS_BAR[t] for t in timesteps], dtype=torch.float64)
    torch.testing.assert_close(schedule.alphas_bar, expected)
    torch.testing.assert_close((1 - schedule.betas).cumprod(dim=0), expected)
    torch.testing.assert_close(schedule.alphas_bar_prev[1:], expected[:-1])
    assert schedule.alphas_bar_prev[0] == 1


@pytest.mark.parametrize("spacing", [ancestral_timesteps, ddim_timesteps])
def test_a_single_step_is_at_pure_noise(spacing: Callable[[int], list[int]]) -> None:
    """Upstream's would be at 0, as `space_timesteps` has it, where noise passes for an image."""
    assert space_timesteps(1) == [0]
    assert spacing(1) == [999]


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("mean", [0.0, MEAN])
def test_one_step_moves_from_noise_to_the_data(solver: str, mean: float) -> None:
    """For images N(mean, 1) the noise in z is √(1 - ᾱ) (z - √ᾱ mean), and their mean is nearly all that z tells."""

    def predict(z: Tensor, t: float) -> Tensor:
        a = ALPHAS_BAR[int(t)]
        return math.sqrt(1 - a) * (z - math.sqrt(a) * mean)

    z = noise()
    found = by_ddim(predict, z, 1) if solver == "ddim" else by_ancestral(predict, z, 1, torch.ones_like)
    a = ALPHAS_BAR[999]
    torch.testing.assert_close(found, mean + math.sqrt(a) * (z - math.sqrt(a) * mean))
    assert float((found - mean).norm()) < 0.01 * float((z - mean).norm())


# ------------------------------------------------------------------ DDIM


@given(steps=st.integers(1, 60))
def test_ddim_is_exact_where_the_noise_is_known(steps: int) -> None:
    found = by_ddim(point_eps, noise(), steps)
    torch.testing.assert_close(found, torch.full(SHAPE, MEAN, dtype=torch.float64))


def test_ddim_follows_the_probability_flow_of_a_gaussian() -> None:
    """The flow is affine: z maps to MEAN + SPREAD (z - sqrt(a) MEAN) / sqrt(a SPREAD² + 1 - a)."""
    z, errors = noise(), []
    for steps in (50, 100, 200, 1000):
        a = ALPHAS_BAR[ddim_timesteps(steps)[-1]]
        exact = MEAN + SPREAD * (z - math.sqrt(a) * MEAN) / math.sqrt(a * SPREAD**2 + 1 - a)
        errors.append(float((by_ddim(gaussian_eps, z, steps) - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01
    assert 1.6 < errors[0] / errors[1] < 2.4, "first order"


def test_ddim_asks_from_noise_to_image_and_discards_the_variance() -> None:
    times: list[float] = []

    def predict(z: Tensor, t: float) -> Tensor:
        times.append(t)
        return torch.cat((gaussian_eps(z, t), torch.full_like(z, float("nan"))), dim=1)

    assert torch.equal(by_ddim(predict, noise(), 10), by_ddim(gaussian_eps, noise(), 10))
    assert times == list(range(900, -1, -100))


# ------------------------------------------------------------------ ancestral sampling


@given(steps=st.integers(1, 60), sigma=st.booleans())
def test_the_last_step_adds_no_noise(steps: int, sigma: bool) -> None:
    """With the noise known, x0 is MEAN at every step, and the last step returns it."""

    def predict(z: Tensor, t: float) -> Tensor:
        return torch.cat((point_eps(z, t), torch.zeros_like(z)), dim=1) if sigma else point_eps(z, t)

    found = by_ancestral(predict, noise(), steps, lambda z: torch.full_like(z, 100.0))
    torch.testing.assert_close(found, torch.full(SHAPE, MEAN, dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 2, 10, 250])
def test_means_multiply_by_the_root_of_alpha(steps: int) -> None:
    """For images N(0, 1) the noise is sqrt(1 - a) z, and each posterior mean sqrt(alpha) z."""

    def predict(z: Tensor, t: float) -> Tensor:
        return math.sqrt(1 - ALPHAS_BAR[int(t)]) * z

    found = by_ancestral(predict, noise(), steps, torch.zeros_like)
    a = ALPHAS_BAR[ancestral_timesteps(steps)[-1]]
    torch.testing.assert_close(found, math.sqrt(a) * noise())


@pytest.mark.parametrize("v", [-1.0, -0.5, 0.0, 1.0])
def test_the_learned_variance_lies_between_its_bounds(v: float) -> None:
    """v = -1 is the posterior's variance, v = 1 is beta, geometric in between."""
    steps, schedule = 3, respaced_schedule(ancestral_timesteps(3))

    def predict(z: Tensor, _: float) -> Tensor:
        return torch.cat((torch.zeros_like(z), torch.full_like(z, v)), dim=1)

    drawn = iter([torch.ones(SHAPE, dtype=torch.float64)] + [torch.zeros(SHAPE, dtype=torch.float64)] * 2)
    moved = by_ancestral(predict, noise(), steps, lambda _: next(drawn))
    still = by_ancestral(predict, noise(), steps, torch.zeros_like)
    beta = float(schedule.betas[2])
    posterior = beta * float((1 - schedule.alphas_bar[1]) / (1 - schedule.alphas_bar[2]))
    sigma = math.sqrt(beta ** ((v + 1) / 2) * posterior ** ((1 - v) / 2))
    # without predicted noise the rest of the way divides by sqrt(a_1)
    expected = torch.full(SHAPE, sigma / math.sqrt(float(schedule.alphas_bar[1])), dtype=torch.float64)
    torch.testing.assert_close(moved - still, expected, rtol=1e-6, atol=1e-6)


def test_without_a_learned_variance_the_posteriors_is_used() -> None:
    def learned(z: Tensor, t: float) -> Tensor:
        return torch.cat((gaussian_eps(z, t), torch.full_like(z, -1.0)), dim=1)

    def fixed(seed: int) -> Callable[[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return lambda z: torch.randn(z.shape, generator=generator, dtype=z.dtype)

    found = by_ancestral(gaussian_eps, noise(), 20, fixed(1))
    torch.testing.assert_close(found, by_ancestral(learned, noise(), 20, fixed(1)))


def test_ancestral_samples_have_the_distribution_of_the_images() -> None:
    """With variance beta the chain keeps N(0, 1) exactly: sqrt(alpha)² + beta = 1."""
    generator = torch.Generator().manual_seed(0)

    def predict(z: Tensor, t: float) -> Tensor:
        return torch.cat((math.sqrt(1 - ALPHAS_BAR[int(t)]) * z, torch.ones_like(z)), dim=1)

    z = torch.randn(200, 1, 10, 10, generator=generator)
    found = by_ancestral(predict, z, 50, lambda z: torch.randn(z.shape, generator=generator))
    assert abs(float(found.std()) - 1) < 0.02
    assert abs(float(found.mean())) < 0.03
