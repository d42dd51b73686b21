"""DDPM weights: linear betas, learned-range variance, upstream's step spacing.

DDPM: https://arxiv.org/abs/2006.11239; learned variance: https://arxiv.org/abs/2102.09672; DDIM:
https://arxiv.org/abs/2010.02502. Schedules are float64, as in guided-diffusion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.diffusion.guidance import Predictor
from ditmoe_cli.diffusion.schedule import TRAINING_STEPS, ddpm_timesteps
from ditmoe_cli.diffusion.solvers import Solver

StepNoise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Schedule:
    """Timesteps that are used, ascending, and their betas and cumulative alphas (float64, one per step)."""

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
    """Return the schedule that a solver for DDPM weights steps along."""
    return respaced_schedule(ddpm_timesteps(solver, steps))


def noised(x: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return z_t = √ᾱ x + √(1 - ᾱ) ε."""
    return float(alpha_bar.sqrt()) * x + float((1 - alpha_bar).sqrt()) * noise


def predicted_x0(z: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return x₀ = z / √ᾱ - √(1/ᾱ - 1) ε, what is left of z without the predicted noise."""
    return z / float(alpha_bar.sqrt()) - eps * float((1 / alpha_bar - 1).sqrt())


def ddim(predict: Predictor, z: Tensor, steps: int) -> Tensor:
    """Run DDIM with eta 0: z ← √ᾱ' x₀ + √(1 - ᾱ') ε from noise z (N, C, H, W)."""
    schedule, channels = sampling_schedule("ddim", steps), z.shape[1]
    for i in reversed(range(steps)):
        eps = predict(z, schedule.timesteps[i])[:, :channels]
        x0 = predicted_x0(z, eps, schedule.alphas_bar[i])
        previous = schedule.alphas_bar_prev[i]
        z = float(previous.sqrt()) * x0 + float((1 - previous).sqrt()) * eps
    return z


def ancestral(predict: Predictor, z: Tensor, steps: int, noise: StepNoise) -> Tensor:
    """Run ancestral sampling from noise z; `noise(z)` returns fresh noise of z's shape at every step.

    The mean is the posterior's at the predicted x₀. Where the output carries a second half v, the variance is
    exp(w ln β + (1 - w) ln β̃), w = (v + 1) / 2; otherwise it is the posterior's β̃.
    """
    schedule, channels = sampling_schedule("ddpm", steps), z.shape[1]
    posterior = schedule.betas * (1 - schedule.alphas_bar_prev) / (1 - schedule.alphas_bar)
    # the first posterior variance is 0: upstream clips its logarithm to the second's
    log_posterior = torch.cat((posterior[1:2] if steps > 1 else schedule.betas[:1], posterior[1:])).log()
    for i in reversed(range(steps)):
        out = predict(z, schedule.timesteps[i])
        eps, rest = out[:, :channels], out[:, channels:]
        x0 = predicted_x0(z, eps, schedule.alphas_bar[i])
        alpha, previous = 1 - schedule.betas[i], schedule.alphas_bar_prev[i]
        weight_x0 = schedule.betas[i] * previous.sqrt() / (1 - schedule.alphas_bar[i])
        weight_z = (1 - previous) * alpha.sqrt() / (1 - schedule.alphas_bar[i])
        mean = float(weight_x0) * x0 + float(weight_z) * z
        low, high = float(log_posterior[i]), float(schedule.betas[i].log())
        w = (rest + 1) / 2 if rest.shape == z.shape else torch.zeros_like(z)
        drawn = noise(z)
        z = mean if i == 0 else mean + (0.5 * (w * high + (1 - w) * low)).exp() * drawn
    return z
