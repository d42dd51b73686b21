"""DPM-Solver++(2M), a multistep method of second order for data predictions (https://arxiv.org/abs/2211.01095).

With z_t = α_t x + σ_t ε, λ = ln(α / σ), h = λ_t - λ_s the step from s to t, and x̂ the predicted data,

    D   = x̂_s + h / (2 h') (x̂_s - x̂_{s'})         s' the point before, h' = λ_s - λ_{s'}
    z_t = σ_t / σ_s z_s - α_t (e^{-h} - 1) D

The step out of pure noise (λ = -∞) and the one after it have no finite h', and the last, to σ = 0, no finite h: these
are of first order, D = x̂_s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from ditmoe_cli.diffusion.ddpm import predicted_x0, sampling_schedule
from ditmoe_cli.diffusion.guidance import Predictor

Level = tuple[float, float]  # α and σ


def dpmpp_2m(denoise: Callable[[Tensor, int], Tensor], z: Tensor, levels: Sequence[Level]) -> Tensor:
    """Step z (N, C, H, W) through `levels`; the last may have σ = 0.

    ``denoise(z, i)`` predicts the data at level i.
    """
    before: Tensor | None = None
    for i in range(len(levels) - 1):
        (alpha, sigma), (next_alpha, next_sigma) = levels[i], levels[i + 1]
        clean = denoise(z, i)
        guess = clean
        if before is not None:
            guess = clean + _extrapolation(levels[i - 1], levels[i], levels[i + 1]) * (clean - before)
        decay = next_sigma * alpha / (next_alpha * sigma)  # e^{-h}
        z = next_sigma / sigma * z - next_alpha * (decay - 1) * guess
        before = clean
    return z


def _extrapolation(before: Level, here: Level, after: Level) -> float:
    """Return h / (2 h'), 0 where one of both is infinite."""
    if before[0] == 0 or after[1] == 0:
        return 0.0
    last, here_, next_ = (math.log(alpha / sigma) for alpha, sigma in (before, here, after))
    return (next_ - here_) / (2 * (here_ - last))


def flow_dpmpp_2m(predict: Predictor, z: Tensor, steps: int) -> Tensor:
    """Sample rectified-flow weights from noise z: α = 1 - t, σ = t, x̂ = z - t v, equal steps of t."""
    channels = z.shape[1]
    times = [i / steps for i in range(steps, -1, -1)]

    def denoise(z: Tensor, i: int) -> Tensor:
        return z - times[i] * predict(z, times[i])[:, :channels]

    return dpmpp_2m(denoise, z, [(1 - t, t) for t in times])


def ddpm_dpmpp_2m(predict: Predictor, z: Tensor, steps: int) -> Tensor:
    """Sample DDPM weights from noise z: α = √ᾱ, σ = √(1 - ᾱ), x̂ = (z - σ ε) / α.

    Of the prediction the first C channels are ε, a variance half is left out. Timesteps are even ones from 999 on,
    of which the last step reaches the image.
    """
    schedule, channels = sampling_schedule("ddpm-dpmpp-2m", steps), z.shape[1]
    order = list(reversed(range(steps)))

    def denoise(z: Tensor, i: int) -> Tensor:
        step = order[i]
        return predicted_x0(z, predict(z, schedule.timesteps[step])[:, :channels], schedule.alphas_bar[step])

    kept = [float(schedule.alphas_bar[step]) for step in order]
    return dpmpp_2m(denoise, z, [*((math.sqrt(a), math.sqrt(1 - a)) for a in kept), (1.0, 0.0)])
