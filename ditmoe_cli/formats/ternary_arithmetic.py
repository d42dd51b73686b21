"""Ternary formats: the best scales, rounding, packing and unpacking.

If c ≠ 0 for the k largest |w| of a group, s = Σ_k ι |w| / Σ_k ι is best for importances ι, and lowers the error
Σ_j ι_j (w_j - ŵ_j)² by (Σ_k ι |w|)² / Σ_k ι; all k are tried, which finds the least error there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.base import Grid, NumberFormat
from ditmoe_cli.formats.columns import Columns, round_uniformly
from ditmoe_cli.formats.packed_sizes import TERNARY_PER_BYTE, ternary_bytes
from ditmoe_cli.formats.packing import base3_digits, pack_base3, row_chunk
from ditmoe_cli.formats.scaling import group_errors, group_steps, grouped, inverse, over_rows, steps
from ditmoe_cli.formats.scratch import scratch
from ditmoe_cli.formats.trained_parts import group_products
from ditmoe_cli.formats.unpacking import fill_rows, multiply_groups


@dataclass(frozen=True)
class TernaryGrid(Grid):
    """Values -s, 0 and s for each `group` of columns; `scale` (out, groups) is as read back from the file, in fp32."""

    group: int
    scale: Tensor

    def round(self, values: Tensor, columns: Tensor) -> Tensor:
        """Return values (out, n) rounded to the nearest that the grids of their `columns` (n,) hold, in fp32."""
        scale = self.scale.index_select(1, columns // self.group)
        return steps(values.float(), inverse(scale), -1.0, 1.0).mul_(scale)

    def columns(self, columns: Tensor) -> Columns:
        """Return the grids of `columns` (n,)."""
        scale = self.scale.T.index_select(0, columns // self.group)
        low, high = (scale.new_full((), limit).expand_as(scale) for limit in (-1.0, 1.0))
        return Columns(round_uniformly, (inverse(scale), low, high, scale))

    def parts(self, weight: Tensor, info: TensorInfo) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the tensors that store a weight (out, in), rounded to the nearest, by the part that each plays."""
        codes = torch.empty(self.shape, dtype=torch.int8, device=weight.device)
        chunk = row_chunk(*self.shape, weight.device)
        for part, scale, target in zip(*(torch.split(t, chunk) for t in (weight, self.scale, codes)), strict=True):
            signs = group_steps(grouped(part, self.group), inverse(scale), -1.0, 1.0)
            target.copy_(signs.flatten(1)[:, : self.shape[1]])
        return {
            "packed": pack_base3(codes),
            "scale": self.scale.half(),
            "shape": torch.tensor(self.shape, dtype=torch.int32),
        }


def ternary_grid(fmt: NumberFormat, weight: Tensor, importance: Tensor | None, group: int) -> TernaryGrid:
    """Return the grid of a weight (out, in) that fp16 holds, its columns weighed by `importance` (in,)."""
    weights = None if importance is None else grouped(importance.detach()[None], group).clone()
    scale = over_rows(weight, lambda part: best_scales(grouped(part, group), weights))
    return TernaryGrid(fmt, (weight.shape[0], weight.shape[1]), group, scale)


def best_scales(groups: Tensor, importance: Tensor | None) -> Tensor:
    """Return the scales (rows, groups) of `groups` (rows, groups, group)."""
    if importance is None:
        sizes = _descending_sizes(groups)
        total, mass = sizes.cumsum(dim=2), torch.arange(1, groups.shape[2] + 1, device=groups.device)
    else:
        sizes, order = groups.abs().sort(dim=2, descending=True)
        weights = importance.expand_as(sizes).gather(2, order)
        total, mass = (weights * sizes).cumsum(dim=2), weights.cumsum(dim=2).clamp_min_(torch.finfo().tiny)
    means = total / mass
    best = (total.mul_(means)).argmax(dim=2, keepdim=True)
    optimum, largest = means.gather(2, best)[..., 0].half().float(), sizes[..., 0].half().float()

    def error(scale: Tensor) -> Tensor:
        return group_errors(groups, group_steps(groups, inverse(scale), -1.0, 1.0), scale, importance)

    # The optimum is rounded to fp16, which may leave it behind where the two are almost the same.
    return torch.where(error(optimum) <= error(largest), optimum, largest)


def _descending_sizes(groups: Tensor) -> Tensor:
    """Return |w| of each group from the largest to the least; they hold until the next call in this thread."""
    if groups.device.type != "cpu":
        return groups.abs().sort(dim=2, descending=True).values
    sizes = torch.abs(groups, out=scratch("sizes", tuple(groups.shape), groups.device)).neg_()
    sizes.numpy().sort(axis=2)  # a twentieth of the time that torch takes for groups as small
    return sizes.neg_()


def unpack_ternary(tensors: Mapping[str, Tensor], out: Tensor, *, group: int) -> None:
    """Write the weight of `tensors` ``packed`` and ``scale`` into `out`: code times the scale of its group, in fp32."""
    packed, scale, columns = tensors["packed"], tensors["scale"], out.shape[1]

    def compute(values: Tensor, part: slice) -> None:
        first = part.start * columns // TERNARY_PER_BYTE  # a whole number, as `part` starts at a multiple of five
        bytes_ = packed[first : first + ternary_bytes(values.numel())]
        codes = base3_digits(bytes_, torch.float32)[: values.numel()].view(values.shape)
        multiply_groups(codes, scale[part].float(), group, values)

    fill_rows(out, compute, TERNARY_PER_BYTE)


def composed_ternary(packed: Tensor, numbers: Mapping[str, Tensor], *, shape: tuple[int, ...], group: int) -> Tensor:
    """Return the matrix of `packed` codes and of ``scale`` among `numbers`, with gradients to it."""
    codes = base3_digits(packed, torch.float32)[: math.prod(shape)].view(shape).clone()
    return group_products(codes, numbers["scale"], group)
