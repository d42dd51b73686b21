"""Rectified flow as DiT-MoE trains it: z_t = (1 - t) x + t ε, velocity v = ε - x, t in (0, 1] unscaled."""

from __future__ import annotations

from torch import Tensor

from ditmoe_cli.diffusion.guidance import Predictor


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return z_t for images x and noise (N, C, H, W) at times t (N,)."""
    t = t.reshape(-1, 1, 1, 1)
    return (1 - t) * x + t * noise


def velocity_target(x: Tensor, noise: Tensor) -> Tensor:
    """Return what the model is trained to predict, ε - x."""
    return noise - x


def euler(predict: Predictor, z: Tensor, steps: int) -> Tensor:
    """Integrate dz/dt = v from t = 1 to 0 in equal steps: z ← z - v(z, i/steps) / steps.

    `z` (N, C, H, W) is noise. Of the prediction the first C channels are the velocity. Upstream's solver.
    """
    channels = z.shape[1]
    for i in range(steps, 0, -1):
        z = z - predict(z, i / steps)[:, :channels] / steps
    return z
