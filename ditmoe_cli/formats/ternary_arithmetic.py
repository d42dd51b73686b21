"""Ternary formats: the best scales, rounding, packing and unpacking.

If c ≠ 0 for the k largest |w| of a group, s = Σ_k ι |w| / Σ_k ι is best for importances ι, and lowers the error
Σ_j ι_j (w_j - ŵ_j)² by (Σ_k ι |w|)² / Σ_k ι; all k are tried, which finds the least error there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.base import Grid, NumberFormat
from ditmoe_cli.formats.packing import base3_digits, pack_base3, row_chunk
from ditmoe_cli.formats.scaling import grouped, inverse, row_chunks, scale_groups, steps


@dataclass(frozen=True)
class TernaryGrid(Grid):
    """Values -s, 0 and s for each `group` of columns; `scale` (out, groups) is as read back from the file, in fp32."""

    group: int
    scale: Tensor

    def round(self, values: Tensor, columns: Tensor) -> Tensor:
        """Return values (out, n) rounded to the nearest that the grids of their `columns` (n,) hold, in fp32."""
        scale = self.scale.index_select(1, columns // self.group)
        return steps(values.float(), inverse(scale), -1.0, 1.0).mul_(scale)

    def parts(self, weight: Tensor, info: TensorInfo) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the tensors that store a weight (out, in), rounded to the nearest, by the part that each plays."""
        rows, columns = self.shape
        chunk = row_chunk(rows, columns, weight.device)
        codes = []
        for first in range(0, rows, chunk):
            part = slice(first, first + chunk)
            inverse_scale = inverse(self.scale[part, :, None])
            signs = steps(grouped(weight[part].float(), self.group), inverse_scale, -1.0, 1.0)
            codes.append(signs.flatten(1)[:, :columns].to(torch.int8))
        return {
            "packed": pack_base3(torch.cat(codes)),
            "scale": self.scale.half(),
            "shape": torch.tensor(self.shape, dtype=torch.int32),
        }


def ternary_grid(fmt: NumberFormat, weight: Tensor, importance: Tensor | None, group: int) -> TernaryGrid:
    """Return the grid of a weight (out, in) that fp16 holds, its columns weighed by `importance` (in,)."""
    weights = None if importance is None else grouped(importance.detach().float()[None], group)
    scale = torch.cat([best_scales(grouped(part.float(), group), weights) for part in row_chunks(weight)])
    return TernaryGrid(fmt, (weight.shape[0], weight.shape[1]), group, scale)


def best_scales(groups: Tensor, importance: Tensor | None) -> Tensor:
    """Return the scales (rows, groups) of `groups` (rows, groups, group)."""
    sizes, order = groups.abs().sort(dim=2, descending=True)
    weights = torch.ones_like(sizes) if importance is None else importance.expand_as(sizes).gather(2, order)
    total, mass = (weights * sizes).cumsum(dim=2), weights.cumsum(dim=2).clamp_min_(torch.finfo().tiny)
    means = total / mass
    best = (total * means).argmax(dim=2, keepdim=True)
    optimum, largest = means.gather(2, best)[..., 0].half().float(), sizes[..., 0].half().float()

    def error(scale: Tensor) -> Tensor:
        codes = steps(groups, inverse(scale)[..., None], -1.0, 1.0)
        squares = torch.addcmul(groups, codes, scale[..., None], value=-1).square_()
        return (squares if importance is None else squares.mul_(importance)).sum(dim=2)

    # The optimum is rounded to fp16, which may leave it behind where the two are almost the same.
    return torch.where(error(optimum) <= error(largest), optimum, largest)


def unpack_ternary(tensors: Mapping[str, Tensor], *, shape: tuple[int, ...], group: int) -> Tensor:
    """Return the fp32 weight of `tensors` ``packed`` and ``scale``: code times the scale of its group."""
    values = base3_digits(tensors["packed"], torch.float32)[: shape[0] * shape[1]].reshape(shape)
    scale_groups(values, tensors["scale"].float(), None, group)
    return values
