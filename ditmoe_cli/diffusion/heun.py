"""Heun's method for the flow's ordinary differential equation dz/dt = v(z, t), from t = 1 to 0.

    z' = z - h v(z, t),    z ← z - h/2 (v(z, t) + v(z', t - h)),    h = 1 / steps

The global error is O(h²). The last step is Euler's, so that the model is never asked at t = 0, which it was not
trained at: one local error of O(h²) leaves the order as it is. https://arxiv.org/abs/2206.00364, algorithm 1.
"""

from __future__ import annotations

from torch import Tensor

from ditmoe_cli.diffusion.guidance import Predictor


def heun(predict: Predictor, z: Tensor, steps: int) -> Tensor:
    """Integrate from noise z (N, C, H, W) in equal steps, 2 · steps - 1 evaluations; the first C channels are v."""
    channels = z.shape[1]
    for i in range(steps, 0, -1):
        slope = predict(z, i / steps)[:, :channels]
        reached = z - slope / steps
        if i > 1:
            reached = z - (slope + predict(reached, (i - 1) / steps)[:, :channels]) / (2 * steps)
        z = reached
    return z
