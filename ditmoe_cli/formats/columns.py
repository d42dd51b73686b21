"""Grids laid out column after column, for rounding that goes over the columns of many rows in turn (GPTQ).

What a value is rounded to follows from a few numbers of its row and column, such as scale and zero point. Looked up for
many columns at once, they leave a handful of small operations for each column, and matrices whose formats differ in
numbers alone are rounded by the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rule = Callable[..., None]
"""Takes values, and a tensor of their shape for each number; overwrites the values with the nearest of their grids."""


@dataclass(frozen=True)
class Columns:
    """The grids of n columns of `out` rows.

    Attributes:
        rule: how values are rounded.
        tables: (..., n, out) numbers that the rule takes.
    """

    rule: Rule
    tables: tuple[Tensor, ...]

    def round_(self, values: Tensor) -> None:
        """Overwrite values (..., n, out) with the nearest that their grids hold."""
        self.rule(values, *self.tables)

    def one_by_one(self) -> list[tuple[Tensor, ...]]:
        """Return the numbers (..., out) of each column."""
        if not self.tables:
            return []
        return list(zip(*(table.unbind(-2) for table in self.tables), strict=True))

    def every(self, step: int) -> Columns:
        """Return the grids of each `step`-th row."""
        return Columns(self.rule, tuple(table[..., ::step] for table in self.tables))


def stacked(parts: Sequence[Columns]) -> Columns:
    """Return the grids of several matrices of one shape and rule, (parts, n, out)."""
    return Columns(parts[0].rule, tuple(torch.stack(tables) for tables in _tables(parts)))


def beside(parts: Sequence[Columns]) -> Columns:
    """Return the grids of the rows of several matrices of one rule, with equal numbers of columns."""
    if len(parts) == 1:
        return parts[0]
    return Columns(parts[0].rule, tuple(torch.cat(tables, dim=-1) for tables in _tables(parts)))


def _tables(parts: Sequence[Columns]) -> list[tuple[Tensor, ...]]:
    if any(part.rule is not parts[0].rule for part in parts):
        raise ValueError("grids of different rules cannot be rounded to together")
    return list(zip(*(part.tables for part in parts), strict=True))


def round_uniformly(values: Tensor, inverse: Tensor, low: Tensor, high: Tensor, scale: Tensor) -> None:
    """Overwrite values by the nearest of `low` … `high` steps of a scale, given 1 / scale too."""
    values.mul_(inverse).round_().clamp_(low, high).mul_(scale)
