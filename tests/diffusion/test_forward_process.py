"""The forward process of both families, and the schedules of DDPM."""

from __future__ import annotations

import itertools
import operator

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditmoe_cli.diffusion.forward_process import interpolate, respaced_schedule, velocity_target
from ditmoe_cli.diffusion.schedule import (
    ancestral_timesteps,
    ddim_timesteps,
)

ALPHAS_BAR = list(itertools.accumulate((1 - (1e-4 + (2e-2 - 1e-4) * i / 999) for i in range(1000)), operator.mul))


SHAPE = (2, 3, 4, 4)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_velocity_is_the_slope_of_the_path() -> None:
    x, eps, t, step = noise(1), noise(2), torch.tensor([0.3, 0.8], dtype=torch.float64), 1e-6
    slope = (interpolate(x, eps, t + step) - interpolate(x, eps, t - step)) / (2 * step)
    torch.testing.assert_close(slope, velocity_target(x, eps), rtol=1e-6, atol=1e-6)


def test_the_path_starts_at_the_image_and_ends_at_the_noise() -> None:
    x, eps = noise(1), noise(2)
    assert torch.equal(interpolate(x, eps, torch.zeros(2, dtype=torch.float64)), x)
    assert torch.equal(interpolate(x, eps, torch.ones(2, dtype=torch.float64)), eps)


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
