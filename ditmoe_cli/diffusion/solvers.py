"""Solvers: pure functions of a predictor, noise z (N, C, H, W) and the times to step along.

Solvers of rectified-flow weights integrate dz/dt = v(z, t) from t = 1 to 0. Their `times` are those at which equal
steps start, as `schedule.flow_times` gives them; the step is h = 1 / len(times). Solvers of DDPM weights step along a
`forward_process.Schedule`, from its last timestep to its first. Of a prediction the first C channels are the velocity
or the noise; the rest is a variance that only ancestral sampling uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ditmoe_cli.diffusion.forward_process import Schedule, predicted_x0, sampling_schedule
from ditmoe_cli.diffusion.predictor import Predictor
from ditmoe_cli.diffusion.schedule import HEUN_STARTS, Solver, flow_times

StepNoise = Callable[[Tensor], Tensor]
Level = tuple[float, float]  # α and σ


def integrate(solver: Solver, steps: int, predict: Predictor, z: Tensor, noise: StepNoise) -> Tensor:
    """Run a solver from noise z; ``noise(z)`` draws fresh noise of z's shape, for ancestral sampling."""
    flow: Mapping[Solver, Callable[[Sequence[float]], Tensor]] = {
        "euler": lambda times: euler(predict, z, times),
        "heun": lambda times: heun(predict, z, times),
        "ab2": lambda times: adams_bashforth(predict, z, times, order=2),
        "ab3": lambda times: started_adams_bashforth(predict, z, times),
        "ab4": lambda times: adams_bashforth(predict, z, times, order=4),
        "dpmpp-2m": lambda times: flow_dpmpp_2m(predict, z, times),
    }
    ddpm: Mapping[Solver, Callable[[Schedule], Tensor]] = {
        "ddim": lambda schedule: ddim(predict, z, schedule),
        "ddim-trailing": lambda schedule: ddim(predict, z, schedule),
        "ddpm": lambda schedule: ancestral(predict, z, schedule, noise),
        "ddpm-dpmpp-2m": lambda schedule: ddpm_dpmpp_2m(predict, z, schedule),
    }
    if solver in flow:
        return flow[solver](flow_times(steps))
    return ddpm[solver](sampling_schedule(solver, steps))


# ------------------------------------------------------------------ rectified flow


def euler(predict: Predictor, z: Tensor, times: Sequence[float]) -> Tensor:
    """Return z after steps z ← z - h v(z, t), upstream's solver."""
    channels = z.shape[1]
    for t in times:
        z = z - predict(z, t)[:, :channels] / len(times)
    return z


def heun(predict: Predictor, z: Tensor, times: Sequence[float]) -> Tensor:
    """Return z after Heun's steps, two evaluations each (https://arxiv.org/abs/2206.00364, algorithm 1).

        z' = z - h v(z, t),    z ← z - h/2 (v(z, t) + v(z', t - h))

    The global error is O(h²). The last step is Euler's, since the model was not trained at t = 0; its local error of
    O(h²) leaves the order as it is.
    """
    channels = z.shape[1]
    for i, t in enumerate(times):
        z = _heun_step(predict, z, times, i, predict(z, t)[:, :channels])
    return z


def _heun_step(predict: Predictor, z: Tensor, times: Sequence[float], i: int, slope: Tensor) -> Tensor:
    """Return z after step i of Heun's, whose slope at its start is known."""
    steps = len(times)
    end = z - slope / steps
    if i + 1 == steps:
        return end
    return z - (slope + predict(end, times[i + 1])[:, : z.shape[1]]) / (2 * steps)


ADAMS_COEFFICIENTS: Mapping[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def adams_slope(slopes: Sequence[Tensor]) -> Tensor:
    """Return Σ β_j v_{n-j} of the last slopes, newest first, by the method of as many terms (1 to 4)."""
    coefficients = ADAMS_COEFFICIENTS[len(slopes)]
    total = coefficients[0] * slopes[0]
    for coefficient, slope in zip(coefficients[1:], slopes[1:], strict=True):
        total = total + coefficient * slope
    return total


def adams_bashforth(predict: Predictor, z: Tensor, times: Sequence[float], order: int) -> Tensor:
    """Return z after Adams-Bashforth steps z ← z - h Σ_j β_j v_{n-j}, one evaluation each.

    With β of order k the local error is O(h^{k+1}). The first k - 1 steps lack a history and are of orders 1, 2, …:
    trajectories are nearly straight near pure noise, and an exact start would cost more evaluations than it saves. Over
    all of t, order 2 stays order 2; order 4 gains accuracy, not its full order.
    Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, III.1.
    """
    channels = z.shape[1]
    slopes: list[Tensor] = []
    for t in times:
        slopes = [predict(z, t)[:, :channels], *slopes][:order]
        z = z - adams_slope(slopes) / len(times)
    return z


def started_adams_bashforth(predict: Predictor, z: Tensor, times: Sequence[float]) -> Tensor:
    """Return z after Adams-Bashforth steps of order 3, the first two by Heun's method: two evaluations more in all.

    A first step of order 1 makes most of the error of `adams_bashforth` where trajectories bend near pure noise.
    """
    channels = z.shape[1]
    slopes: list[Tensor] = []
    for i, t in enumerate(times):
        slopes = [predict(z, t)[:, :channels], *slopes][:3]
        if i < HEUN_STARTS:
            z = _heun_step(predict, z, times, i, slopes[0])
        else:
            z = z - adams_slope(slopes) / len(times)
    return z


def flow_dpmpp_2m(predict: Predictor, z: Tensor, times: Sequence[float]) -> Tensor:
    """Return z after DPM-Solver++(2M) steps with α = 1 - t, σ = t and predicted data x̂ = z - t v."""
    channels = z.shape[1]

    def denoise(z: Tensor, i: int) -> Tensor:
        return z - times[i] * predict(z, times[i])[:, :channels]

    return dpmpp_2m(denoise, z, [(1 - t, t) for t in (*times, 0.0)])


# ------------------------------------------------------------------ both families


def dpmpp_2m(denoise: Callable[[Tensor, int], Tensor], z: Tensor, levels: Sequence[Level]) -> Tensor:
    """Step z through `levels` by DPM-Solver++(2M), of second order (https://arxiv.org/abs/2211.01095).

    With z_t = α_t x + σ_t ε, λ = ln(α / σ), h = λ_t - λ_s the step from s to t, and x̂ the predicted data,

        D   = x̂_s + h / (2 h') (x̂_s - x̂_{s'})         s' the point before, h' = λ_s - λ_{s'}
        z_t = σ_t / σ_s z_s - α_t (e^{-h} - 1) D

    The step out of pure noise (λ = -∞) and the step after it have no finite h', and the last, to σ = 0, has no finite
    h: these are of first order, D = x̂_s.

    Args:
        denoise: ``denoise(z, i)`` predicts the data at level i.
        z: at the first level.
        levels: (α, σ); the last may have σ = 0.
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
    """Return h / (2 h'); 0 where either is infinite."""
    if before[0] == 0 or after[1] == 0:
        return 0.0
    last, here_, next_ = (math.log(alpha / sigma) for alpha, sigma in (before, here, after))
    return (next_ - here_) / (2 * (here_ - last))


# ------------------------------------------------------------------ DDPM


def ddim(predict: Predictor, z: Tensor, schedule: Schedule) -> Tensor:
    """Return z after DDIM steps with eta 0, z ← √ᾱ' x₀ + √(1 - ᾱ') ε (https://arxiv.org/abs/2010.02502)."""
    channels = z.shape[1]
    for i in reversed(range(len(schedule.timesteps))):
        eps = predict(z, schedule.timesteps[i])[:, :channels]
        x0 = predicted_x0(z, eps, schedule.alphas_bar[i])
        previous = schedule.alphas_bar_prev[i]
        z = float(previous.sqrt()) * x0 + float((1 - previous).sqrt()) * eps
    return z


def ancestral(predict: Predictor, z: Tensor, schedule: Schedule, noise: StepNoise) -> Tensor:
    """Return z after ancestral steps; ``noise(z)`` draws fresh noise of z's shape at every step.

    The mean is the posterior's at the predicted x₀. Where the output carries a second half v, the variance is
    exp(w ln β + (1 - w) ln β̃) with w = (v + 1) / 2 (https://arxiv.org/abs/2102.09672); otherwise it is the posterior's
    β̃.
    """
    channels, steps = z.shape[1], len(schedule.timesteps)
    posterior = schedule.betas * (1 - schedule.alphas_bar_prev) / (1 - schedule.alphas_bar)
    # The first posterior variance is 0: upstream clips its logarithm to the second's.
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


def ddpm_dpmpp_2m(predict: Predictor, z: Tensor, schedule: Schedule) -> Tensor:
    """Return z after DPM-Solver++(2M) steps with α = √ᾱ, σ = √(1 - ᾱ) and x̂ = (z - σ ε) / α; the last has σ = 0."""
    channels = z.shape[1]
    order = list(reversed(range(len(schedule.timesteps))))

    def denoise(z: Tensor, i: int) -> Tensor:
        step = order[i]
        return predicted_x0(z, predict(z, schedule.timesteps[step])[:, :channels], schedule.alphas_bar[step])

    kept = [float(schedule.alphas_bar[step]) for step in order]
    return dpmpp_2m(denoise, z, [*((math.sqrt(a), math.sqrt(1 - a)) for a in kept), (1.0, 0.0)])
