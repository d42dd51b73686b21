"""Linear layers whose weights may be of another dtype than what they multiply."""

from __future__ import annotations

from torch import Tensor, nn

from ditmoe_cli.formats.products import linear


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input: weight and bias are cast to it where theirs differs."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b in the dtype of x (..., in)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.weight.to(x.dtype), bias)
