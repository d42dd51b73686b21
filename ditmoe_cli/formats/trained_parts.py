"""Stored tensors as training sees them, and the arithmetic that carries gradients to them.

A stored tensor t is trained as values v of fp32, its first ones v_0, and stands for numbers p(v) that its weight's
matrix is made of:

| part | v | p(v) | v_0 |
|---|---|---|---|
| `Cast`: floating weights and factors | t | v | t |
| `Factors`: scales | f | t_0 f | 1 |
| `WholeNumbers`: packed codes | c | round(v), within the range of the bits | c |

Scales are trained by factors, so that one rate suits those of all sizes. Whole numbers are rounded where the matrix is
computed, and gradients pass the rounding as if it were none (straight through: https://arxiv.org/abs/1308.3432).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


class TrainedPart(ABC):
    """A stored tensor that training changes."""

    @abstractmethod
    def values(self, tensor: Tensor) -> Tensor:
        """Return the values that a stored tensor stands for, in fp32."""

    @abstractmethod
    def numbers(self, values: Tensor) -> Tensor:
        """Return the numbers p(v) that values stand for, with gradients."""

    @abstractmethod
    def stored(self, values: Tensor) -> Tensor:
        """Return the tensor that is stored of values."""

    def rounded(self, values: Tensor) -> Tensor:
        """Return the values that stand for what is stored of `values`."""
        return self.values(self.stored(values))


@dataclass(frozen=True)
class Cast(TrainedPart):
    """A floating tensor itself, written in `dtype`."""

    dtype: torch.dtype

    def values(self, tensor: Tensor) -> Tensor:
        """Return the tensor in fp32."""
        return tensor.float()

    def numbers(self, values: Tensor) -> Tensor:
        """Return the values."""
        return values

    def stored(self, values: Tensor) -> Tensor:
        """Return the values in the dtype that is stored."""
        return values.to(self.dtype)


@dataclass(frozen=True)
class Factors(TrainedPart):
    """A factor for each of the scales `before` training, on whose device they are; scales of 0 stay 0."""

    before: Tensor

    def values(self, tensor: Tensor) -> Tensor:
        """Return scales as factors of those before training."""
        scales = self.before.float()
        return torch.where(scales == 0, 1.0, tensor.float() / scales)

    def numbers(self, values: Tensor) -> Tensor:
        """Return the scales before training times their factors."""
        return self.before.float() * values

    def stored(self, values: Tensor) -> Tensor:
        """Return the scales before training times their factors, in the dtype that is stored."""
        return self.numbers(values).to(self.before.dtype)


@dataclass(frozen=True)
class WholeNumbers(TrainedPart):
    """Whole numbers `low` to `high` that are packed.

    `pack` makes the packed tensor of whole numbers in fp32, and `unpack` these of the tensor.
    """

    low: int
    high: int
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]

    def values(self, tensor: Tensor) -> Tensor:
        """Return the numbers that are stored."""
        return self.unpack(tensor)

    def numbers(self, values: Tensor) -> Tensor:
        """Return the nearest whole numbers; gradients are those of the values within their range, 0 outside."""
        within = values.clamp(self.low, self.high)
        return within + (within.round() - within).detach()

    def stored(self, values: Tensor) -> Tensor:
        """Return the nearest whole numbers, packed."""
        return self.pack(values.round().clamp_(self.low, self.high))


def group_products(numbers: Tensor, scale: Tensor, group: int, zero: Tensor | None = None) -> Tensor:
    """Return (c - z) s (rows, n) of numbers c (rows, n), for scales s and zero points z (rows, groups) of their groups.

    With gradients. Recording them keeps c - z and the result.
    """
    rows, n = numbers.shape
    short = -n % group
    groups = (F.pad(numbers, (0, short)) if short else numbers).view(rows, -1, group)
    if zero is not None:
        groups = groups - zero[..., None]
    return (groups * scale[..., None]).flatten(1)[:, :n]


def rounded_through(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 values rounded to a dtype, in fp32; gradients pass as if they were not rounded."""
    if dtype in (torch.float32, torch.float64):
        return values
    return values + (values.to(dtype).float() - values).detach()
