"""Adams-Bashforth methods for the flow's ordinary differential equation dz/dt = v(z, t), from t = 1 to 0.

    z_{n+1} = z_n - h Σ_j β_j v_{n-j},    h = 1 / steps

With coefficients β of order k the local error is O(h^{k+1}). The first k - 1 steps, which lack a history, are of
orders 1, 2, …: near pure noise, where they lie, trajectories are nearly straight, and an evaluation for each step is
what makes the method cheap. Over t, order 2 stays order 2 by that; order 4 gains accuracy, not its full order.
Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, III.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ditmoe_cli.diffusion.guidance import Predictor

COEFFICIENTS: Mapping[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def adams_slope(slopes: Sequence[Tensor]) -> Tensor:
    """Return Σ β_j v_{n-j} of the last slopes, newest first, by the method of as many terms (1 to 4)."""
    coefficients = COEFFICIENTS[len(slopes)]
    total = coefficients[0] * slopes[0]
    for coefficient, slope in zip(coefficients[1:], slopes[1:], strict=True):
        total = total + coefficient * slope
    return total


def adams_bashforth(predict: Predictor, z: Tensor, steps: int, order: int) -> Tensor:
    """Integrate from noise z (N, C, H, W) in equal steps, one evaluation each; the first C channels are v."""
    channels = z.shape[1]
    slopes: list[Tensor] = []
    for i in range(steps, 0, -1):
        slopes = [predict(z, i / steps)[:, :channels], *slopes][:order]
        z = z - adams_slope(slopes) / steps
    return z
