"""What the tests of GPTQ share: grids made of a rule and a table, and GPTQ of one matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ditmoe_cli.compression.rounding.gptq import BLOCK, factor, gptq
from ditmoe_cli.formats.columns import Columns, Rule, stacked

STEP = 0.5


@dataclass(frozen=True)
class ByRule:
    """A grid of a rule, and of tables (out, in) that it takes."""

    rule: Rule
    tables: tuple[Tensor, ...] = field(default=())

    def columns(self, columns: Tensor) -> Columns:
        return Columns(self.rule, tuple(table[:, columns].T for table in self.tables))

    def round(self, values: Tensor, columns: Tensor) -> Tensor:
        turned = values.T.clone()
        self.columns(columns).round_(turned)
        return turned.T


def _to_step(values: Tensor) -> None:
    values.copy_((values / STEP).round() * STEP)


def _keep(values: Tensor) -> None:
    del values


def _to_levels(values: Tensor, least: Tensor, step: Tensor, levels: Tensor) -> None:
    values.copy_(torch.minimum(((values - least) / step).round().clamp(min=0), levels) * step + least)


TO_STEP: Any = ByRule(_to_step)  # the unbounded uniform grid
KEEP: Any = ByRule(_keep)


def min_max(weight: Tensor, bits: int = 3, group: int = 64) -> Any:
    """The asymmetric uniform grid from each group's least to its largest weight."""
    grouped = weight.view(len(weight), -1, group)
    low = grouped.amin(-1)
    levels = (1 << bits) - 1
    step = (grouped.amax(-1) - low) / levels
    tables = (part.repeat_interleave(group, dim=1) for part in (low, step, torch.full_like(low, levels)))
    return ByRule(_to_levels, tuple(tables))


def solved(
    weight: Tensor, hessian: Tensor, grid: Any, damping: float, act_order: bool = True, block: int = BLOCK
) -> Tensor:
    """GPTQ of one matrix (out, in), in act-order or in the order of columns."""
    order = torch.arange(len(hessian))
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    last_first = order.flip(0)
    passed, _ = factor(hessian[last_first][:, last_first], damping)
    values = weight.T[last_first].unsqueeze(0)
    rounded, _ = gptq(values, passed.unsqueeze(0), lambda here: stacked([grid.columns(last_first[here])]), block)
    result = torch.empty_like(weight)
    result[:, last_first] = rounded[0].T
    return result


def error_of(difference: Tensor, moment: Tensor) -> float:
    """tr(D M Dᵀ) of a difference D (out, in)."""
    return float(((difference @ moment) * difference).sum(dtype=torch.float64))
