"""The times at which each solver asks a model, and whether guided. Torch-free, so that options can count them.

Rectified-flow models are asked at t in (0, 1], 1 being noise; DDPM ones at timesteps 0 to 999, 999 being noise.
"""

from __future__ import annotations

from itertools import accumulate, repeat

from ditmoe_cli.diffusion.solvers import SOLVERS, Solver
from ditmoe_cli.model.config import Sampler

TRAINING_STEPS = 1000
Interval = tuple[float, float]
ALWAYS: Interval = (0.0, 1.0)


def ancestral_timesteps(steps: int) -> list[int]:
    """Return `steps` timesteps from 0 to 999, evenly spaced and rounded (upstream's spacing ``"N"``).

    Positions are summed up as upstream sums them: near a half, i * stride would round otherwise. One step is at 999,
    not at 0 as upstream has it, where the model would take noise for an image, and hand it back.
    """
    if steps == 1:
        return [TRAINING_STEPS - 1]
    stride = (TRAINING_STEPS - 1) / (steps - 1)
    return [round(position) for position in accumulate(repeat(stride, steps - 1), initial=0.0)]


def ddim_timesteps(steps: int) -> list[int]:
    """Return `steps` timesteps at the smallest integer stride that yields exactly that many (``"ddimN"``).

    Where none does, which upstream refuses, they are ⌊1000 i / steps⌋, so that the last is near pure noise too. One
    step is at 999, not at 0, as in `ancestral_timesteps`.
    """
    if steps == 1:
        return [TRAINING_STEPS - 1]
    strides = (s for s in range(1, TRAINING_STEPS + 1) if len(range(0, TRAINING_STEPS, s)) == steps)
    stride = next(strides, None)
    return list(range(0, TRAINING_STEPS, stride)) if stride else [i * TRAINING_STEPS // steps for i in range(steps)]


def data_timesteps(steps: int) -> list[int]:
    """Return round(999 i / steps), i from 1: even steps from 999 whose last lands on the image itself.

    DPM-Solver's: a point at timestep 0 would make its last step huge on the scale of ln(α / σ) that it extrapolates on.
    """
    return [round((TRAINING_STEPS - 1) * i / steps) for i in range(1, steps + 1)]


def ddpm_timesteps(solver: Solver, steps: int) -> list[int]:
    """Return the timesteps, ascending, that a solver for DDPM weights steps along."""
    if solver == "ddim":
        return ddim_timesteps(steps)
    return data_timesteps(steps) if solver == "ddpm-dpmpp-2m" else ancestral_timesteps(steps)


def evaluation_times(solver: Solver, steps: int) -> list[float]:
    """Return the time of every evaluation, in their order.

    Heun's are the two ends of each step, without the very last, t = 0.
    """
    if SOLVERS[solver].family == "ddpm":
        return [float(t) for t in reversed(ddpm_timesteps(solver, steps))]
    starts = [i / steps for i in range(steps, 0, -1)]
    if solver != "heun":
        return starts
    return [t for start, end in zip(starts, [*starts[1:], 0.0], strict=True) for t in (start, end) if t > 0]


def noise_level(t: float, family: Sampler) -> float:
    """Return a time on the scale 0 (image) to 1 (noise)."""
    return t if family == "rf" else t / (TRAINING_STEPS - 1)


def is_guided(t: float, scale: float, family: Sampler, interval: Interval = ALWAYS) -> bool:
    """Tell whether both branches of guidance are needed at a time: inside an interval of noise levels alone."""
    return scale != 1.0 and interval[0] <= noise_level(t, family) <= interval[1]
