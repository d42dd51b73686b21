"""Rectified flow on distributions whose velocity is known in closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditmoe_cli.diffusion.forward_process import interpolate, velocity_target
from ditmoe_cli.diffusion.schedule import flow_times
from ditmoe_cli.diffusion.solvers import euler

MEAN, SPREAD = 0.7, 0.4
SHAPE = (2, 3, 4, 4)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_velocity(z: Tensor, t: float) -> Tensor:
    """E[noise - x | z] for x ~ N(MEAN, SPREAD²) and z = (1 - t) x + t noise."""
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    centred = z - (1 - t) * MEAN
    return (t / variance) * centred - (MEAN + (1 - t) * SPREAD**2 / variance * centred)


def test_the_velocity_is_the_slope_of_the_path() -> None:
    x, eps, t, step = noise(1), noise(2), torch.tensor([0.3, 0.8], dtype=torch.float64), 1e-6
    slope = (interpolate(x, eps, t + step) - interpolate(x, eps, t - step)) / (2 * step)
    torch.testing.assert_close(slope, velocity_target(x, eps), rtol=1e-6, atol=1e-6)


def test_the_path_starts_at_the_image_and_ends_at_the_noise() -> None:
    x, eps = noise(1), noise(2)
    assert torch.equal(interpolate(x, eps, torch.zeros(2, dtype=torch.float64)), x)
    assert torch.equal(interpolate(x, eps, torch.ones(2, dtype=torch.float64)), eps)


@given(steps=st.integers(1, 60))
def test_euler_is_exact_on_straight_paths(steps: int) -> None:
    """All images at one point: every path is straight, so any number of steps lands on it."""
    found = euler(lambda z, t: (z - MEAN) / t, noise(), flow_times(steps))
    torch.testing.assert_close(found, torch.full(SHAPE, MEAN, dtype=torch.float64))


def test_euler_has_order_one_on_a_gaussian() -> None:
    exact = MEAN + SPREAD * noise()  # the flow is affine and keeps quantiles
    errors = [float((euler(gaussian_velocity, noise(), flow_times(n)) - exact).norm()) for n in (40, 80, 160, 320)]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(0.9 < order < 1.1 for order in orders), orders
    assert errors[-1] < 0.02 * float(exact.norm())


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_model_is_asked_from_one_downwards_and_never_at_zero(steps: int) -> None:
    times: list[float] = []

    def predict(z: Tensor, t: float) -> Tensor:
        times.append(t)
        return torch.zeros_like(z)

    euler(predict, noise(), flow_times(steps))
    assert times == [i / steps for i in range(steps, 0, -1)]
    assert times[0] == 1.0


def test_the_second_half_of_the_output_is_discarded() -> None:
    def predict(z: Tensor, t: float) -> Tensor:
        return torch.cat((gaussian_velocity(z, t), torch.full_like(z, float("nan"))), dim=1)

    assert torch.equal(euler(predict, noise(), flow_times(7)), euler(gaussian_velocity, noise(), flow_times(7)))
