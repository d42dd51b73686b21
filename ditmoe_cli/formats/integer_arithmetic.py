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
from ditmoe_cli.formats.columns import Columns, round_uniformly
from ditmoe_cli.formats.packed_sizes import FEWEST_TELLING, packed_words
from ditmoe_cli.formats.packing import pack_columns, pack_rows, row_chunk, unpack_columns, unpack_rows
from ditmoe_cli.formats.scaling import (
    Extents,
    group_errors,
    group_steps,
    grouped,
    inverse,
    row_chunks,
    steps,
)
from ditmoe_cli.formats.scratch import scratch
from ditmoe_cli.formats.trained_parts import WholeNumbers, group_products
from ditmoe_cli.formats.unpacking import fill_rows, multiply_groups, subtract_zeros

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

    def columns(self, columns: Tensor) -> Columns:
        """Return the grids of `columns` (n,)."""
        group = columns // self.group
        scale = self.scale.T.index_select(0, group)
        zero = None if self.zero is None else self.zero.T.index_select(0, group)
        low, high = (
            limit if isinstance(limit, Tensor) else scale.new_full((), limit).expand_as(scale)
            for limit in self._limits(zero)
        )
        return Columns(round_uniformly, (inverse(scale), low, high, scale))

    def parts(self, weight: Tensor, info: TensorInfo) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the tensors that store a weight (out, in), rounded to the nearest, by the part that each plays."""
        rows, columns = self.shape
        packed = torch.empty(rows, packed_words(columns, self.bits), dtype=torch.int32, device=weight.device)
        chunk = row_chunk(rows, columns, weight.device)
        for first in range(0, rows, chunk):
            part = slice(first, first + chunk)
            packed[part] = pack_rows(self._codes(weight[part], part)[:, :columns], self.bits)
        parts = {
            "packed": packed,
            "scale": self.scale.half(),
            "shape": torch.tensor((*self.shape, *([self.bits] if columns < FEWEST_TELLING else [])), dtype=torch.int32),
        }
        if self.zero is not None:
            parts["zero_point"] = pack_columns(self.zero.int(), self.bits)
        return parts

    def _codes(self, values: Tensor, rows: slice) -> Tensor:
        """Return the codes of the `rows` whose values are given, as uint8, with those of the last group's padding."""
        zero = None if self.zero is None else self.zero[rows]
        counted = group_steps(grouped(values, self.group), inverse(self.scale[rows]), *self._limits(zero))
        counted += 2 ** (self.bits - 1) if zero is None else zero[..., None]
        return counted.to(torch.int16).to(torch.uint8).flatten(1)


def integer_grid(
    fmt: NumberFormat,
    weight: Tensor,
    extents: Extents,
    importance: Tensor | None,
    *,
    bits: int,
    group: int,
    symmetric: bool,
) -> IntegerGrid:
    """Return the grid of a weight (out, in) that fp16 holds, its columns weighed by `importance` (in,)."""
    weights = None if importance is None else grouped(importance.detach()[None], group).clone()
    scale, zero = torch.empty_like(extents.low), torch.empty_like(extents.low)
    done = 0
    for part in row_chunks(weight):
        rows = slice(done, done + len(part))
        trial = _Trial(grouped(part, group), weights, 2**bits - 1, symmetric)
        scale[rows], zero[rows] = _search(trial, Extents(extents.low[rows], extents.high[rows]), bits)
        done += len(part)
    return IntegerGrid(fmt, (weight.shape[0], weight.shape[1]), bits, group, scale, None if symmetric else zero)


@dataclass(frozen=True)
class _Trial:
    """Groups (rows, groups, group), on which scales and zero points (rows, groups) are tried.

    Attributes:
        importance: of each value, or None.
        most: the largest code, 2^b - 1.
        symmetric: whether all zero points are 2^(b-1).
    """

    groups: Tensor
    importance: Tensor | None
    most: int
    symmetric: bool

    def steps(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Return how many steps from 0 the nearest values lie; they hold until the next call in this thread."""
        return self.steps_within(inverse(scale), -zero, self.most - zero)

    def steps_within(self, inverse_scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return what `steps` returns, given 1 / scale and the least and the largest number of steps."""
        if self.symmetric:
            return group_steps(self.groups, inverse_scale, -(self.most + 1) // 2, self.most // 2)
        return group_steps(self.groups, inverse_scale, low, high)

    def error(self, counted: Tensor, scale: Tensor) -> Tensor:
        """Return Σ ι (w - c s)² of the `counted` steps c."""
        return group_errors(self.groups, counted, scale, self.importance)

    def refit(self, counted: Tensor) -> Tensor:
        """Return the least squares scale of the `counted` steps c, Σ ι w c / Σ ι c², in fp16's values."""
        products = scratch("squares", tuple(counted.shape), counted.device)
        weighted = counted if self.importance is None else counted * self.importance
        above = torch.mul(weighted, self.groups, out=products).sum(dim=2)
        below = torch.mul(weighted, counted, out=products).sum(dim=2)
        return above.div_(below.clamp_min_(torch.finfo().tiny)).half().float()


@dataclass
class _Best:
    """The best scale and zero point of each group so far, and their errors."""

    error: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, trial: _Trial, scales: Tensor, zeros: Tensor) -> _Best:
        """Return the best of the scales and zero points (candidates, rows, groups), of several the first.

        Scale 0 is left to groups whose errors are all infinite or NaN.
        """
        errors = torch.empty_like(scales)
        each = zip(scales, inverse(scales), -zeros, trial.most - zeros, errors, strict=True)
        for scale, inverse_scale, low, high, error in each:
            error.copy_(trial.error(trial.steps_within(inverse_scale, low, high), scale))
        least, first = errors.nan_to_num_(torch.inf, torch.inf).min(dim=0, keepdim=True)
        unknown = least[0] == torch.inf
        scale, zero = (tried.gather(0, first)[0].masked_fill_(unknown, 0) for tried in (scales, zeros))
        return cls(least[0], scale, zero)

    def offer(self, error: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Take what is better; return where that is."""
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        if zero is not self.zero:
            self.zero = torch.where(better, zero, self.zero)
        return better


def _search(trial: _Trial, extents: Extents, bits: int) -> tuple[Tensor, Tensor]:
    """Return scales and zero points (rows, groups) of the groups of a trial, which have these `extents`."""
    best = _Best.of(trial, *_candidates(extents, bits, trial.symmetric))

    def attempt(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Offer a scale and zero point; return their steps, and where they are better."""
        counted = trial.steps(scale, zero)
        return counted, best.offer(trial.error(counted, scale), scale, zero)

    def refit_best() -> tuple[Tensor, Tensor]:
        return attempt(trial.refit(trial.steps(best.scale, best.zero)), best.zero)

    counted, better = refit_best()
    # Where that was no better, the steps of the best are those that were refitted, and give the same again.
    attempt(torch.where(better, trial.refit(counted), best.scale), best.zero)
    if not trial.symmetric:
        for shift in (-1, 1):
            counted, _ = attempt(best.scale, (best.zero + shift).clamp_(0, trial.most))
            attempt(trial.refit(counted), (best.zero + shift).clamp_(0, trial.most))
        refit_best()
    return best.scale, best.zero


def _candidates(extents: Extents, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scales, in fp16's values, and zero points (candidates, rows, groups), in the order in which to try them.

    They are shrunken copies of the range, and the largest value as the scale: of a group whose values are all the
    same, no scale is as exact as the value itself.
    """
    most, half, low, high = 2**bits - 1, 2.0 ** (bits - 1), extents.low, extents.high
    shrinks = torch.linspace(1, _LEAST_SHRINK[bits], _SHRINKS).tolist()

    def column(values: list[float]) -> Tensor:
        return low.new_tensor(values)[:, None, None]

    if symmetric:  # one side of the grid has a step more, and a negative scale gives it to the other
        sides = [torch.maximum(fewer / (half - 1), more / half) for more, fewer in ((-low, high), (high, -low))]
        signed = torch.stack([column(shrinks) * sides[0], column([-shrink for shrink in shrinks]) * sides[1]], dim=1)
        largest = extents.largest
        scales = torch.cat([signed.flatten(0, 1), torch.stack([largest, largest / (half - 1)])]).half().float()
        return scales, torch.full_like(low, half).expand_as(scales)
    scales = ((high - low) * column([shrink / most for shrink in shrinks])).half().float()
    zeros = (-low * column(shrinks) * inverse(scales)).round_().clamp_(0, most)
    return torch.cat([scales, extents.largest.half().float()[None]]), torch.cat([zeros, (low < 0).float()[None]])


def unpack_integer(tensors: Mapping[str, Tensor], out: Tensor, *, bits: int, group: int) -> None:
    """Write the weight of `tensors` ``packed``, ``scale`` and, of asymmetric formats, ``zero_point`` into `out`.

    That is (code - zero) times the scale of its group, in fp32. Differences of up to 6 bits fit a signed byte.
    """
    packed, scale = tensors["packed"], tensors["scale"]
    rows, columns = out.shape
    zeros = unpack_columns(tensors["zero_point"], rows, bits) if "zero_point" in tensors else None
    if zeros is not None and bits == 8:
        zeros = zeros.float()

    def compute(values: Tensor, part: slice) -> None:
        codes = unpack_rows(packed[part], columns, bits)
        zero = 2 ** (bits - 1) if zeros is None else zeros[part]
        if bits == 8:
            subtract_zeros(values.copy_(codes), zero, group)
        else:
            subtract_zeros(codes, zero, group)
            values.copy_(codes.view(torch.int8))
        multiply_groups(values, scale[part].float(), group, values)

    fill_rows(out, compute)


def composed_integer(
    tensors: Mapping[str, Tensor], numbers: Mapping[str, Tensor], *, shape: tuple[int, ...], bits: int, group: int
) -> Tensor:
    """Return the matrix of ``scale`` and, where they are trained, `trained_codes` among `numbers`, with gradients.

    `tensors` are what is stored, by part.
    """
    rows, columns = shape
    codes = numbers["packed"] if "packed" in numbers else _centred_codes(tensors["packed"], columns, bits)
    if "zero_point" not in tensors:
        return group_products(codes, numbers["scale"], group)
    zero = unpack_columns(tensors["zero_point"], rows, bits).float().sub_(2 ** (bits - 1))
    return group_products(codes, numbers["scale"], group, zero)


def trained_codes(columns: int, bits: int) -> WholeNumbers:
    """Return codes (rows, columns), less 2^(bits-1), as training sees them.

    They are so as large as what they stand for, relative to their scale.
    """
    half = 2 ** (bits - 1)
    return WholeNumbers(
        -half,
        half - 1,
        pack=lambda numbers: pack_rows((numbers + half).to(torch.uint8), bits),
        unpack=lambda words: _centred_codes(words, columns, bits),
    )


def _centred_codes(packed: Tensor, columns: int, bits: int) -> Tensor:
    return unpack_rows(packed, columns, bits).float().sub_(2 ** (bits - 1))
