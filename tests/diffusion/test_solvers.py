"""Solvers of both families where the solution is known: data from N(MEAN, SPREAD²) in every value, or at one point."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ditmoe_cli.diffusion.forward_process import respaced_schedule, sampling_schedule
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.schedule import (
    DEFAULT_SOLVER,
    DEFAULT_STEPS,
    SOLVERS,
    Solver,
    ancestral_timesteps,
    ddim_timesteps,
    evaluation_times,
    flow_times,
)
from ditmoe_cli.diffusion.solvers import (
    ADAMS_COEFFICIENTS,
    adams_bashforth,
    adams_slope,
    ancestral,
    ddim,
    ddpm_dpmpp_2m,
    dpmpp_2m,
    euler,
    flow_dpmpp_2m,
    heun,
    integrate,
    started_adams_bashforth,
)
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.loading import build_model

MEAN, SPREAD = 0.7, 0.4
NOISE = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
Solve = Callable[..., Tensor]


def velocity(z: Tensor, t: float) -> Tensor:
    """E[ε - x | z_t = z] where x ~ N(MEAN, SPREAD²); a second half is for solvers to leave out."""
    centred = (z - (1 - t) * MEAN) / ((1 - t) ** 2 * SPREAD**2 + t**2)
    v = t * centred - (MEAN + (1 - t) * SPREAD**2 * centred)
    return torch.cat((v, torch.full_like(v, torch.nan)), dim=1)


def solution() -> Tensor:
    """Where the flow takes NOISE: means are moved, and deviations shrink, as z_t's own."""
    return MEAN + SPREAD * NOISE


def error(solve: Solve, steps: int) -> float:
    return float((solve(velocity, NOISE, flow_times(steps)) - solution()).abs().max())


def ab2(predict: Solve, z: Tensor, times: list[float]) -> Tensor:
    return adams_bashforth(predict, z, times, order=2)


def ab3(predict: Solve, z: Tensor, times: list[float]) -> Tensor:
    return started_adams_bashforth(predict, z, times)


def ab4(predict: Solve, z: Tensor, times: list[float]) -> Tensor:
    return adams_bashforth(predict, z, times, order=4)


@pytest.mark.parametrize(
    ("solve", "order"), [(euler, 1), (heun, 2), (ab2, 2), (ab3, 3)], ids=["euler", "heun", "ab2", "ab3"]
)
def test_halving_the_step_divides_the_error_by_two_to_the_order(solve: Solve, order: int) -> None:
    coarse, fine = error(solve, 200), error(solve, 400)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_dpm_solver_is_of_second_order_between_the_ends() -> None:
    """At the ends ln(α / σ) is infinite, and steps are of first order; over the whole the order is nearly two."""
    level = 0.2, 0.8

    def off(steps: int) -> float:
        times = np.linspace(level[1], level[0], steps + 1)

        def path(t: float) -> Tensor:
            return (1 - t) * MEAN + math.sqrt((1 - t) ** 2 * SPREAD**2 + t**2) * NOISE

        def denoise(z: Tensor, i: int) -> Tensor:
            return z - times[i] * velocity(z, times[i])[:, :1]

        return float((dpmpp_2m(denoise, path(level[1]), [(1 - t, t) for t in times]) - path(level[0])).abs().max())

    assert math.log2(off(800) / off(1600)) == pytest.approx(2, abs=0.1)
    assert math.log2(error(flow_dpmpp_2m, 200) / error(flow_dpmpp_2m, 400)) > 1.7


def test_order_four_gains_on_order_two() -> None:
    """Its start of lower order costs it the full order: that shows only where the start is exact, see below."""
    assert math.log2(error(ab4, 200) / error(ab4, 400)) > 1.8
    for steps in (10, 20, 50, 100):
        assert error(ab4, steps) < error(ab2, steps) < error(euler, steps)


@pytest.mark.parametrize("order", ADAMS_COEFFICIENTS)
def test_a_formula_of_order_k_integrates_polynomials_of_degree_k_less_one(order: int) -> None:
    """∫ t^d from t to t - h, d < k, of slopes at t, t + h, …: exact; of d = k no more."""
    t, h = 0.6, 0.1
    for degree in range(order + 1):
        slopes = [torch.tensor((t + j * h) ** degree, dtype=torch.float64) for j in range(order)]
        exact = (t ** (degree + 1) - (t - h) ** (degree + 1)) / (degree + 1)
        off = abs(h * float(adams_slope(slopes)) - exact)
        assert off < 1e-14 if degree < order else off > 1e-8


@pytest.mark.parametrize("order", ADAMS_COEFFICIENTS)
def test_with_an_exact_start_the_global_error_has_the_full_order(order: int) -> None:
    def path(t: float) -> Tensor:
        return (1 - t) * MEAN + math.sqrt((1 - t) ** 2 * SPREAD**2 + t**2) * NOISE

    def off(steps: int) -> float:
        known = [velocity(path(i / steps), i / steps)[:, :1] for i in range(steps, steps - order + 1, -1)]
        z, slopes = path((steps - order + 1) / steps), list(reversed(known))
        for i in range(steps - order + 1, 0, -1):
            slopes = [velocity(z, i / steps)[:, :1], *slopes][:order]
            z = z - adams_slope(slopes) / steps
        return float((z - solution()).abs().max())

    assert math.log2(off(200) / off(400)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("solve", [euler, heun, ab2, ab3, ab4, flow_dpmpp_2m])
def test_one_point_of_data_is_reached_in_any_number_of_steps(solve: Solve) -> None:
    """With all data at one point trajectories are straight lines, which every method follows exactly."""

    def straight(z: Tensor, t: float) -> Tensor:
        return (z - MEAN) / t

    for steps in (1, 2, 5, 13):
        torch.testing.assert_close(solve(straight, NOISE, flow_times(steps)), torch.full_like(NOISE, MEAN))


def solved(solve: Solve, predict: Solve, steps: int) -> Tensor:
    """Run a solver for DDPM weights along its own schedule."""
    return solve(predict, NOISE, sampling_schedule("ddim" if solve is ddim else "ddpm-dpmpp-2m", steps))


@pytest.mark.parametrize("solve", [ddpm_dpmpp_2m, ddim], ids=["dpmpp-2m", "ddim"])
def test_ddpm_weights_are_solved_with_their_own_schedule(solve: Solve) -> None:
    """z_t = √ᾱ x + √(1 - ᾱ) ε; the probability flow keeps (z - √ᾱ MEAN) / standard deviation as it is."""
    kept = [float(a) for a in respaced_schedule(list(range(1000))).alphas_bar]

    def noise(z: Tensor, t: float) -> Tensor:
        a = kept[int(t)]
        eps = math.sqrt(1 - a) * (z - math.sqrt(a) * MEAN) / (a * SPREAD**2 + 1 - a)
        return torch.cat((eps, torch.full_like(eps, torch.nan)), dim=1)

    start = kept[999]
    spread = math.sqrt(start * SPREAD**2 + 1 - start)
    exact = MEAN + SPREAD * (NOISE - math.sqrt(start) * MEAN) / spread
    off = [float((solved(solve, noise, steps) - exact).abs().max()) for steps in (20, 40, 80)]
    assert off[0] > off[1] > off[2]
    if solve is ddpm_dpmpp_2m:
        theirs = [float((solved(ddim, noise, steps) - exact).abs().max()) for steps in (20, 40, 80)]
        assert all(mine < 0.6 * other for mine, other in zip(off, theirs, strict=True))


def test_one_step_of_dpm_solver_is_ddims() -> None:
    """Both jump to the predicted data; over two levels of one-step history they are the first-order formula."""
    clean = torch.full_like(NOISE, 0.3)
    found = dpmpp_2m(lambda *_: clean, NOISE, [(0.6, 0.8), (0.8, 0.6)])
    eps = (NOISE - 0.6 * clean) / 0.8
    torch.testing.assert_close(found, 0.8 * clean + 0.6 * eps)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_evaluation_times_are_those_that_a_solver_asks_at(solver: Solver, steps: int) -> None:
    asked: list[float] = []

    def watched(z: Tensor, t: float) -> Tensor:
        asked.append(t)
        return z

    integrate(solver, steps, watched, NOISE, torch.zeros_like)
    assert asked == evaluation_times(solver, steps)


# ------------------------------------------------------------------ DDPM

Predict = Callable[[Tensor, float], Tensor]
SHAPE = (2, 3, 4, 4)
ALPHAS_BAR = list(itertools.accumulate((1 - (1e-4 + (2e-2 - 1e-4) * i / 999) for i in range(1000)), operator.mul))


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


@pytest.mark.parametrize("steps", [1, 2, 7, 60])
@pytest.mark.parametrize("solver", ["ddim", "ddim-trailing"])
def test_ddim_is_exact_where_the_noise_is_known(solver: Solver, steps: int) -> None:
    found = integrate(solver, steps, point_eps, noise(), torch.zeros_like)
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


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20])
def test_trailing_ddim_is_the_scheduler_of_diffusers_written_out(steps: int) -> None:
    """``DDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False).step`` at eta 0.

    It steps from t to t - 1000 // N, which for these N is the next timestep, and below 0 to ᾱ = 1.
    """
    expected = z = noise()
    for t in np.round(np.arange(1000, 0, -1000 / steps)).astype(int) - 1:
        previous = t - 1000 // steps
        a, b = ALPHAS_BAR[t], ALPHAS_BAR[previous] if previous >= 0 else 1.0
        eps = gaussian_eps(expected, t)
        x0 = (expected - math.sqrt(1 - a) * eps) / math.sqrt(a)
        expected = math.sqrt(b) * x0 + math.sqrt(1 - b) * eps
    torch.testing.assert_close(integrate("ddim-trailing", steps, gaussian_eps, z, torch.zeros_like), expected)


@pytest.mark.parametrize("steps", [1, 2, 4, 25])
def test_trailing_ddim_of_a_linear_model_is_a_product(steps: int) -> None:
    """With eps = √(1 - ᾱ) z a step from ᾱ to ᾱ' multiplies z by √(ᾱ ᾱ') + √((1 - ᾱ)(1 - ᾱ')); the last has ᾱ' = 1."""

    def predict(z: Tensor, t: float) -> Tensor:
        return math.sqrt(1 - ALPHAS_BAR[int(t)]) * z

    kept = [*(ALPHAS_BAR[1000 * i // steps - 1] for i in range(steps, 0, -1)), 1.0]
    factors = (math.sqrt(a * b) + math.sqrt((1 - a) * (1 - b)) for a, b in itertools.pairwise(kept))
    found = integrate("ddim-trailing", steps, predict, noise(), torch.zeros_like)
    torch.testing.assert_close(found, math.prod(factors) * noise())


@pytest.mark.parametrize("steps", [1, 2, 7, 60])
@pytest.mark.parametrize("sigma", [False, True])
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


@pytest.mark.slow
def test_the_default_for_ddpm_weights_is_nearer_to_a_trained_models_flow_than_ddim(shared: Path) -> None:
    checkpoint = open_checkpoint(shared / "digits-ddpm" / "checkpoint.pt")
    model = build_model(checkpoint, torch.device("cpu"))

    def images(solver: Solver, steps: int) -> Tensor:
        return sample_batch(model, SampleSpec(16, steps, 1.0, 5, solver, tuple(range(10))), range(16))

    solution = images("ddim", 200)
    default, ddim_error = (
        float((images(solver, DEFAULT_STEPS["ddpm"]) - solution).norm()) for solver in (DEFAULT_SOLVER["ddpm"], "ddim")
    )
    assert default < 0.9 * ddim_error
