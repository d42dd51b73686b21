"""Solvers on a flow whose solution is known: data drawn from a Gaussian, N(MEAN, SPREAD²) in every value."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditmoe_cli.diffusion.forward_process import respaced_schedule, sampling_schedule
from ditmoe_cli.diffusion.schedule import SOLVERS, Solver, evaluation_times, flow_times, is_guided, noise_level
from ditmoe_cli.diffusion.solvers import (
    ADAMS_COEFFICIENTS,
    adams_bashforth,
    adams_slope,
    ddim,
    ddpm_dpmpp_2m,
    dpmpp_2m,
    euler,
    flow_dpmpp_2m,
    heun,
    integrate,
)

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


def ab4(predict: Solve, z: Tensor, times: list[float]) -> Tensor:
    return adams_bashforth(predict, z, times, order=4)


@pytest.mark.parametrize(("solve", "order"), [(euler, 1), (heun, 2), (ab2, 2)], ids=["euler", "heun", "ab2"])
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


@pytest.mark.parametrize("solve", [euler, heun, ab2, ab4, flow_dpmpp_2m])
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


@given(steps=st.integers(1, 60), solver=st.sampled_from(sorted(SOLVERS)))
def test_evaluation_times_fall_and_are_as_many_as_said(steps: int, solver: str) -> None:
    times = evaluation_times(solver, steps)  # type: ignore[arg-type]
    assert len(times) == (2 * steps - 1 if solver == "heun" else steps)
    assert all(np.diff(times) <= 0)
    family = SOLVERS[solver].family  # type: ignore[index]
    levels = [noise_level(t, family) for t in times]
    assert min(levels) >= 0 and max(levels) <= 1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_evaluation_times_are_those_that_a_solver_asks_at(solver: Solver, steps: int) -> None:
    asked: list[float] = []

    def watched(z: Tensor, t: float) -> Tensor:
        asked.append(t)
        return z

    integrate(solver, steps, watched, NOISE, torch.zeros_like)
    assert asked == evaluation_times(solver, steps)


def test_guidance_holds_inside_its_interval_alone() -> None:
    assert not is_guided(0.5, 1.0, "rf")
    assert is_guided(0.5, 2.0, "rf")
    assert [is_guided(t, 2.0, "rf", (0.2, 0.6)) for t in (0.1, 0.2, 0.4, 0.6, 0.7)] == [False, True, True, True, False]
    assert [is_guided(t, 2.0, "ddpm", (0.2, 0.6)) for t in (100, 500, 700)] == [False, True, False]
