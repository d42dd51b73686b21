"""What solvers step by: a model's guided output at one time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Predictor(Protocol):
    """Predict a model's guided output for images x (N, C, H, W), all at time t."""

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Return (N, out_channels, H, W), in fp32."""
