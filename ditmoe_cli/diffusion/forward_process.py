"""The forward process, by which images are noised, of both families of weights.

Rectified flow: z_t = (1 - t) x + t ε, velocity v = ε - x, t in (0, 1] unscaled (https://arxiv.org/abs/2209.03003).
DDPM: z_t = √ᾱ x + √(1 - ᾱ) ε, linear betas, 1,000 training steps (https://arxiv.org/abs/2006.11239). Its schedules are
float64, as in guided-diffusion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.diffusion.schedule import TRAINING_STEPS, Solver, ddpm_timesteps


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return z_t = (1 - t) x + t ε for images x and noise ε (N, C, H, W) at times t (N,)."""
    t = t.reshape(-1, 1, 1, 1)
    return (1 - t) * x + t * noise


def velocity_target(x: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity ε - x, the training target of rectified flow."""
    return noise - x


@dataclass(frozen=True)
class Schedule:
    """The timesteps of a DDPM solver, ascending, with beta and cumulative alpha of each (float64)."""

    timesteps: tuple[int, ...]
    betas: Tensor
    alphas_bar: Tensor

    @property
    def alphas_bar_prev(self) -> Tensor:
        """Cumulative alpha of the step before; 1 for the first."""
        return torch.cat((torch.ones(1, dtype=torch.float64), self.alphas_bar[:-1]))


def respaced_schedule(timesteps: list[int]) -> Schedule:
    """Return the schedule over `timesteps` whose cumulative alphas are those of the 1,000 training steps."""
    training = 1.0 - torch.linspace(1e-4, 2e-2, TRAINING_STEPS, dtype=torch.float64)
    alphas_bar = training.cumprod(dim=0)[timesteps]
    previous = torch.cat((torch.ones(1, dtype=torch.float64), alphas_bar[:-1]))
    return Schedule(tuple(timesteps), 1.0 - alphas_bar / previous, alphas_bar)


def sampling_schedule(solver: Solver, steps: int) -> Schedule:
    """Return the schedule of a solver for DDPM weights."""
    return respaced_schedule(ddpm_timesteps(solver, steps))


def noised(x: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return z_t = √ᾱ x + √(1 - ᾱ) ε."""
    return float(alpha_bar.sqrt()) * x + float((1 - alpha_bar).sqrt()) * noise


def predicted_x0(z: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return x₀ = z / √ᾱ - √(1/ᾱ - 1) ε, the image in z without the predicted noise ε."""
    return z / float(alpha_bar.sqrt()) - eps * float((1 / alpha_bar - 1).sqrt())
