"""Integer formats: the search for scales and zero points, rounding, packing and unpacking.

Both are searched for, to lower Σ_j ι_j (w_j - ŵ_j)² over a group with importances ι: shrunken copies of the range that
min-max rounding takes, then least squares, s = Σ ι w (c - z) / Σ ι (c - z)², with neighbouring zero points too. Scales
are rounded to fp16, in which they are stored, before weights are rounded to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.base import Grid, NumberFormat
from ditmoe_cli.formats.packed_sizes import FEWEST_TELLING
from ditmoe_cli.formats.packing import pack_columns, pack_rows, row_chunk, unpack_columns, unpack_values
from ditmoe_cli.formats.scaling import grouped, inverse, row_chunks, scale_groups, steps

_LEAST_SHRINK = {2: 0.35, 3: 0.45, 4: 0.55, 5: 0.65, 6: 0.75, 8: 0.85}  # of the range, by bits
_SHRINKS = 12


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Values (c - z) s for each group of columns.

    Attributes:
        bits, group: of a code; columns of a group.
        scale: (out, groups) as read back from the file, in fp32.
        zero: zero points (out, groups) of asymmetric formats, as fp32.
    """

    bits: int
    group: int
    scale: Tensor
    zero: Tensor | None

    def round(self, values: Tensor, columns: Tensor) -> Tensor:
        """Return values (out, n) rounded to the nearest that the grids of their `columns` (n,) hold, in fp32."""
        values = values.float()
        group = columns // self.group
        scale = self.scale.index_select(1, group)
        zero = None if self.zero is None else self.zero.index_select(1, group)
        return steps(values, inverse(scale), *self._limits(zero)).mul_(scale)

    def _limits(self, zero: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """Return the least and the largest number of steps from 0."""
        if zero is None:
            return -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1
        return -zero, 2**self.bits - 1 - zero

    def parts(self, weight: Tensor, info: TensorInfo) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the tensors that store a weight (out, in), rounded to the nearest, by the part that each plays."""
        rows, columns = self.shape
        chunk = row_chunk(rows, columns, weight.device)
        packed = []
        for first in range(0, rows, chunk):
            part = slice(first, first + chunk)
            zero = None if self.zero is None else self.zero[part, :, None]
            inverse_scale = inverse(self.scale[part, :, None])
            codes = steps(grouped(weight[part].float(), self.group), inverse_scale, *self._limits(zero))
            codes += 2 ** (self.bits - 1) if zero is None else zero
            packed.append(pack_rows(codes.flatten(1)[:, :columns].to(torch.int32), self.bits))
        parts = {
            "packed": torch.cat(packed),
            "scale": self.scale.half(),
            "shape": torch.tensor((*self.shape, *([self.bits] if columns < FEWEST_TELLING else [])), dtype=torch.int32),
        }
        if self.zero is not None:
            parts["zero_point"] = pack_columns(self.zero.int(), self.bits)
        return parts


def integer_grid(
    fmt: NumberFormat,
    weight: Tensor,
    importance: Tensor | None,
    *,
    bits: int,
    group: int,
    symmetric: bool,
) -> IntegerGrid:
    """Return the grid of a weight (out, in) that fp16 holds, its columns weighed by `importance` (in,)."""
    weights = None if importance is None else grouped(importance.detach().float()[None], group)
    fitted = [scales_and_zeros(grouped(part.float(), group), weights, bits, symmetric) for part in row_chunks(weight)]
    zero = None if symmetric else torch.cat([zero for _, zero in fitted])
    scale = torch.cat([scale for scale, _ in fitted])
    return IntegerGrid(fmt, (weight.shape[0], weight.shape[1]), bits, group, scale, zero)


@dataclass
class _Best:
    """The best scale and zero point of each group so far, and their errors."""

    error: Tensor
    scale: Tensor
    zero: Tensor

    def offer(self, error: Tensor, scale: Tensor, zero: Tensor) -> None:
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)


def scales_and_zeros(groups: Tensor, importance: Tensor | None, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scales and zero points (rows, groups) of `groups` (rows, groups, group).

    Zero points are 2^(b-1) if `symmetric`.
    """
    most = 2**bits - 1
    low, high = groups.amin(dim=2).clamp_max_(0), groups.amax(dim=2).clamp_min_(0)
    largest = torch.maximum(high, -low)
    best = _Best(torch.full_like(low, torch.inf), torch.zeros_like(low), torch.zeros_like(low))

    def attempt(scale: Tensor, zero: Tensor) -> Tensor:
        """Offer a scale and zero point; return the least squares scale of the codes they give."""
        scale = scale.half().float()
        zero = zero.clamp(0, most)
        bounds = (-zero[..., None], (most - zero)[..., None])
        codes = steps(groups, inverse(scale)[..., None], *bounds)
        error = torch.addcmul(groups, codes, scale[..., None], value=-1).square_()
        best.offer((error if importance is None else error.mul_(importance)).sum(dim=2), scale, zero)
        weighted = codes if importance is None else codes * importance
        return (weighted * groups).sum(dim=2) / (weighted * codes).sum(dim=2).clamp_min_(torch.finfo().tiny)

    half = torch.full_like(low, 2.0 ** (bits - 1))
    for shrink in torch.linspace(1, _LEAST_SHRINK[bits], _SHRINKS).tolist():
        if symmetric:  # one side of the grid has a step more, and a negative scale gives it to the other
            for sign, more, fewer in ((1, -low, high), (-1, high, -low)):
                attempt(sign * shrink * torch.maximum(fewer / (half - 1), more / half), half)
        else:
            scale = ((high - low) * (shrink / most)).half().float()
            attempt(scale, (-low * shrink * inverse(scale)).round_())
    # Of a group whose values are all the same, no scale is as exact as the value itself.
    attempt(largest, half if symmetric else (low < 0).float())
    if symmetric:
        attempt(largest / (half - 1), half)
    for shift in (0, 0) if symmetric else (0, 0, -1, 1, 0):
        attempt(attempt(best.scale, best.zero + shift), best.zero + shift)
    return best.scale, best.zero


def unpack_integer(tensors: Mapping[str, Tensor], *, shape: tuple[int, ...], bits: int, group: int) -> Tensor:
    """Return the fp32 weight of `tensors` ``packed``, ``scale`` and, of asymmetric formats, ``zero_point``.

    That is (code - zero) times the scale of its group, computed a few rows at a time.
    """
    packed, scale = tensors["packed"], tensors["scale"]
    rows, columns = shape
    values = torch.empty(rows, columns, device=packed.device)
    middle = float(2 ** (bits - 1))
    zeros = unpack_columns(tensors["zero_point"], rows, bits).float() if "zero_point" in tensors else None
    chunk = row_chunk(rows, columns, packed.device)
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        values[part] = unpack_values(packed[part], columns, bits)
        scale_groups(values[part], scale[part].float(), middle if zeros is None else zeros[part], group)
    return values
