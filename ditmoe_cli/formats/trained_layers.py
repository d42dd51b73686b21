"""Linear layers whose stored weights are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ditmoe_cli.formats.base import Composition
from ditmoe_cli.formats.products import linear
from ditmoe_cli.formats.trained_parts import TrainedPart


class TrainedLinear(nn.Module):
    """A linear layer whose matrix is put together for each product, with gradients to the `values` of its parts.

    Parameters are those values, by part; layers may share them. No matrix is kept from one product to the next.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[TrainedPart, nn.Parameter]],
        matrix: Composition,
        bias: nn.Parameter | None,
    ) -> None:
        """Take over parts with their values, how to make a `matrix` of their numbers, and a bias."""
        super().__init__()
        self._parts, self._matrix = {name: part for name, (part, _) in parts.items()}, matrix
        for name, (_, values) in parts.items():
            self.register_parameter(name, values)
        self.bias = bias

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (out, in) in `dtype`, with gradients where they are recorded."""
        numbers = {name: part.numbers(cast(Tensor, getattr(self, name))) for name, part in self._parts.items()}
        return self._matrix(numbers).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b, computed in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.matrix(x.dtype), bias)
