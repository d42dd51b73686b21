"""Linear layers whose weights may be of another dtype than what they multiply."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditmoe_cli.formats.products import linear, prepacked


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input: weight and bias are cast to it where theirs differs."""

    def reset_parameters(self) -> None:
        """Draw random weights, but on torch's meta device, where there are none and drawing takes longest."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b in the dtype of x (..., in)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.matrix(x.dtype), bias)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the weight to multiply by, in `dtype`."""
        weight = self.weight
        if weight.dtype == dtype:
            return weight
        return (weight.to_dense() if weight.is_mkldnn else weight).to(dtype)

    def prepack(self) -> None:
        """Lay the weight out for products (`prepacked`); then it can be neither read nor changed."""
        packed = prepacked(self.weight.detach())
        if packed.is_mkldnn:
            self.weight = nn.Parameter(packed, requires_grad=False)
