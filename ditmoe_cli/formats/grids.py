"""Grids: the values that each format can hold of a matrix, how they are chosen, and rounding to them.

uniform     w = (c - z) s with codes c in 0 … 2^b - 1, and a scale s in fp16 and a whole zero point z for each group of
            columns (z = 2^(b-1) of symmetric formats). Both are searched for, to lower Σ_j ι_j (w_j - ŵ_j)² with
            importances ι: shrunken copies of the range that min-max rounding takes, then least squares,
            s = Σ ι w (c - z) / Σ ι (c - z)², with neighbouring zero points too.
ternary     w = c s with c in -1, 0, 1. If c ≠ 0 for the k largest |w| of a group, s = Σ_k ι |w| / Σ_k ι is
            best, and lowers the error by (Σ_k ι |w|)² / Σ_k ι; all k are tried, which finds the least error there is.
nf4, fp4    w = a q_c with a the largest |w| of 64 (QLoRA, https://arxiv.org/abs/2305.14314), by bitsandbytes'
            arithmetic. Under double quantisation a itself is rounded first, and w to what is then stored.
int8        w = c s / 127 with s the largest |w| of a row in fp16 (LLM.int8, https://arxiv.org/abs/2208.07339).

Scales are rounded to how they are stored before weights are rounded to them. Only uniform and ternary grids heed
importances; the others are as bitsandbytes has them. A matrix in pieces has a grid for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.packing import pack_base3, pack_rows, row_chunk
from ditmoe_cli.formats.weights import (
    BLOCK,
    NESTED_BLOCK,
    Format,
    Pieces,
    Scheme,
    parse_format,
    parse_pieces,
    quant_state_json,
    quantized_members,
)

NF4_CODES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# A sign bit, then 0, 1/16 and six more in the order of their bits, over the largest of them; there is no -0.
FP4_CODES = tuple(
    0.0 + sign * value / 12 for sign in (1.0, -1.0) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)
_FP4_ASCENDING = (
    11,
    10,
    13,
    12,
    15,
    14,
    9,
    0,
    8,
    1,
    6,
    7,
    4,
    5,
    2,
    3,
)  # bitsandbytes' order, with 8, the other 0, above 0
_TINY = 1e-38  # what bitsandbytes divides by at least
_LEAST_SHRINK = {2: 0.35, 3: 0.45, 4: 0.55, 5: 0.65, 6: 0.75, 8: 0.85}  # of the range, by bits
_SHRINKS = 12
_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Nested:
    """Absmax under double quantisation: codes (blocks,), the scale of each 256 of them, and what was subtracted."""

    codes: Tensor
    absmax: Tensor
    offset: float


@dataclass(frozen=True)
class Grid:
    """The values that a matrix (out, in) can take in a format.

    Attributes:
        scheme: the format.
        shape: out, in.
        scale: as read back from the file, in fp32: (out, groups) of uniform and ternary formats, (blocks,) of nf4 and
            fp4, (out,) of int8.
        zero: zero points (out, groups) of asymmetric formats, as fp32.
        nested: how `scale` is stored under double quantisation.
    """

    scheme: Scheme
    shape: tuple[int, int]
    scale: Tensor
    zero: Tensor | None = None
    nested: Nested | None = None

    def round(self, values: Tensor, columns: Tensor) -> Tensor:
        """Return values (out, n) rounded to the nearest that the grids of their `columns` (n,) hold, in fp32."""
        values = values.float()
        scheme = self.scheme
        if scheme.grouped:
            group = columns // scheme.group
            scale = self.scale.index_select(1, group)
            zero = None if self.zero is None else self.zero.index_select(1, group)
            return _steps(values, _inverse(scale), *_limits(scheme, zero)).mul_(scale)
        if scheme.kind == "int8":
            return _row_codes(values, self.scale).mul_((self.scale / 127.0)[:, None])
        rows = torch.arange(self.shape[0], device=values.device)[:, None]
        scale = self.scale[(rows * self.shape[1] + columns) // BLOCK]
        ascending = _codebook(scheme.kind, values.device).sort().values
        return ascending[_rank(values, scale, scheme).int()].mul_(scale)


@dataclass(frozen=True)
class PiecedGrid:
    """The values that a matrix (out, in) can take in pieces: those of each piece's grid in its rows or columns."""

    pieces: Pieces
    grids: tuple[Grid, ...]

    def round(self, values: Tensor, columns: Tensor) -> Tensor:
        """Return values (out, n) rounded to the nearest that the grids of their `columns` (n,) hold, in fp32."""
        rounded = torch.empty_like(values, dtype=torch.float32)
        for part, grid in zip(self.pieces.slices, self.grids, strict=True):
            if self.pieces.axis == 0:
                rounded[part] = grid.round(values[part], columns)
                continue
            mine = (columns >= part.start) & (columns < part.stop)
            if bool(mine.any()):
                rounded[:, mine] = grid.round(values[:, mine], columns[mine] - part.start)
        return rounded


def grid_of(
    weight: Tensor, fmt: Format, importance: Tensor | None = None, *, name: str = "weight"
) -> Grid | PiecedGrid:
    """Return the grid on which to round a weight (out, in); see `whole_grid` for the arguments and errors."""
    pieces = parse_pieces(fmt)
    if pieces is None:
        return whole_grid(weight, fmt, importance, name=name)
    by_column = importance is not None and pieces.axis == 1
    return PiecedGrid(
        pieces,
        tuple(
            whole_grid(part, each, importance[where] if importance is not None and by_column else importance, name=name)
            for part, each, where in zip(parts_of(weight, pieces), pieces.formats, pieces.slices, strict=True)
        ),
    )


def parts_of(weight: Tensor, pieces: Pieces) -> list[Tensor]:
    """Return the pieces of a weight (out, in). Raises `ValueError` where they are not as many rows or columns."""
    return list(weight.split(list(pieces.counts), dim=pieces.axis))  # type: ignore[no-untyped-call]


def whole_grid(weight: Tensor, fmt: Format, importance: Tensor | None = None, *, name: str = "weight") -> Grid:
    """Return the grid on which to round a weight (out, in) that is in one piece.

    Args:
        weight: floating.
        fmt: the format.
        importance: of each column (in,), at least 0; equal where none is given. Uniform and ternary grids only.
        name: of the tensor, for errors.

    Raises:
        BadInputError: values exceed fp16, in which the scales of all but nf4 and fp4 are stored.
    """
    scheme = parse_format(fmt)
    weight = weight.detach()
    rows, columns = weight.shape
    if scheme.kind in ("nf4", "fp4"):
        return _four_bit_grid(weight, scheme)
    if scheme.kind == "int8":
        scale = _over_rows(weight, lambda part: part.to(torch.float16).float().abs().amax(dim=1))
        _check_half(scale, name)
        return Grid(scheme, (rows, columns), scale)
    _check_half(_over_rows(weight, lambda part: part.float().abs().amax(dim=1)), name)
    weights = None if importance is None else _grouped(importance.detach().float()[None], scheme.group)
    found = [
        _ternary_grid(_grouped(part.float(), scheme.group), weights)
        if scheme.kind == "ternary"
        else _uniform_grid(_grouped(part.float(), scheme.group), weights, scheme)
        for part in torch.split(weight, row_chunk(rows, columns, weight.device))
    ]
    zero = None if scheme.symmetric else torch.cat([zero for _, zero in found])
    return Grid(scheme, (rows, columns), torch.cat([scale for scale, _ in found]), zero)


def pack_on(grid: Grid | PiecedGrid, weight: Tensor, info: TensorInfo, fmt: Format) -> dict[str, Tensor]:
    """Return the members of a weight (out, in) by name, its values being rounded to the nearest on `grid`."""
    if isinstance(grid, PiecedGrid):
        if parse_pieces(fmt) != grid.pieces:
            raise ValueError(f"a grid of {grid.pieces.name} does not take {fmt}")
        columns = (grid.grids, parts_of(weight, grid.pieces), grid.pieces.infos(info), grid.pieces.formats)
        packed = [pack_on(*each) for each in zip(*columns, strict=True)]
        return {name: tensor for members in packed for name, tensor in members.items()}
    scheme = grid.scheme
    if parse_format(fmt) != scheme or tuple(weight.shape) != grid.shape:
        raise ValueError(f"a grid of {scheme.name} {grid.shape} does not take {fmt} {tuple(weight.shape)}")
    if scheme.kind in ("nf4", "fp4"):
        members = _pack_four_bit(grid, weight.detach(), info)
    else:
        members = (_pack_grouped if scheme.grouped else _pack_rows_int8)(grid, weight.detach())
    return dict(zip((member.name for member in quantized_members(info, fmt)), members, strict=True))


# ------------------------------------------------------------------ grouped formats


def _grouped(values: Tensor, group: int) -> Tensor:
    """Return values (rows, n) as (rows, groups, group), the last group padded with zeros, which every grid holds."""
    return F.pad(values, (0, -values.shape[1] % group)).reshape(len(values), -1, group)


def _inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, and 0 where it is 0: what is divided by it has to become code 0."""
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def _limits(scheme: Scheme, zero: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
    """Return the least and the largest number of steps from 0."""
    if scheme.kind == "ternary":
        return -1.0, 1.0
    if zero is None:
        return -(2.0 ** (scheme.bits - 1)), 2.0 ** (scheme.bits - 1) - 1
    return -zero, 2**scheme.bits - 1 - zero


def _steps(values: Tensor, inverse: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Return how many steps from 0 the nearest value of a uniform grid lies: code less zero point."""
    return (values * inverse).round_().clamp_(low, high)  # type: ignore[arg-type]


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


def _uniform_grid(groups: Tensor, importance: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return scales and zero points (rows, groups) of groups (rows, groups, group)."""
    steps = 2**scheme.bits - 1
    low, high = groups.amin(dim=2).clamp_max_(0), groups.amax(dim=2).clamp_min_(0)
    largest = torch.maximum(high, -low)
    best = _Best(torch.full_like(low, torch.inf), torch.zeros_like(low), torch.zeros_like(low))

    def attempt(scale: Tensor, zero: Tensor) -> Tensor:
        """Offer a scale and zero point; return the least squares scale of the codes they give."""
        scale = scale.half().float()
        zero = zero.clamp(0, steps)
        bounds = (-zero[..., None], (steps - zero)[..., None])
        codes = _steps(groups, _inverse(scale)[..., None], *bounds)
        error = torch.addcmul(groups, codes, scale[..., None], value=-1).square_()
        best.offer((error if importance is None else error.mul_(importance)).sum(dim=2), scale, zero)
        weighted = codes if importance is None else codes * importance
        return (weighted * groups).sum(dim=2) / (weighted * codes).sum(dim=2).clamp_min_(torch.finfo().tiny)

    half = torch.full_like(low, 2.0 ** (scheme.bits - 1))
    for shrink in torch.linspace(1, _LEAST_SHRINK[scheme.bits], _SHRINKS).tolist():
        if scheme.symmetric:  # one side of the grid has a step more, and a negative scale gives it to the other
            for sign, more, fewer in ((1, -low, high), (-1, high, -low)):
                attempt(sign * shrink * torch.maximum(fewer / (half - 1), more / half), half)
        else:
            scale = ((high - low) * (shrink / steps)).half().float()
            attempt(scale, (-low * shrink * _inverse(scale)).round_())
    # Of a group whose values are all the same, no scale is as exact as the value itself.
    attempt(largest, half if scheme.symmetric else (low < 0).float())
    if scheme.symmetric:
        attempt(largest / (half - 1), half)
    for shift in (0, 0) if scheme.symmetric else (0, 0, -1, 1, 0):
        attempt(attempt(best.scale, best.zero + shift), best.zero + shift)
    return best.scale, best.zero


def _ternary_grid(groups: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the scales (rows, groups) of groups (rows, groups, group), twice: there are no zero points."""
    sizes, order = groups.abs().sort(dim=2, descending=True)
    weights = torch.ones_like(sizes) if importance is None else importance.expand_as(sizes).gather(2, order)
    total, mass = (weights * sizes).cumsum(dim=2), weights.cumsum(dim=2).clamp_min_(torch.finfo().tiny)
    means = total / mass
    best = (total * means).argmax(dim=2, keepdim=True)
    optimum, largest = means.gather(2, best)[..., 0].half().float(), sizes[..., 0].half().float()

    def error(scale: Tensor) -> Tensor:
        codes = _steps(groups, _inverse(scale)[..., None], -1.0, 1.0)
        squares = torch.addcmul(groups, codes, scale[..., None], value=-1).square_()
        return (squares if importance is None else squares.mul_(importance)).sum(dim=2)

    # The optimum is rounded to fp16, which may leave it behind where the two are almost the same.
    scale = torch.where(error(optimum) <= error(largest), optimum, largest)
    return scale, scale


def _pack_grouped(grid: Grid, weight: Tensor) -> list[Tensor]:
    scheme = grid.scheme
    rows, columns = grid.shape
    chunk = row_chunk(rows, columns, weight.device)
    packed = []
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        zero = None if grid.zero is None else grid.zero[part, :, None]
        inverse = _inverse(grid.scale[part, :, None])
        steps = _steps(_grouped(weight[part].float(), scheme.group), inverse, *_limits(scheme, zero))
        if scheme.kind == "uniform":
            steps += 2 ** (scheme.bits - 1) if zero is None else zero
        codes = steps.flatten(1)[:, :columns].to(torch.int8 if scheme.kind == "ternary" else torch.int32)
        packed.append(codes if scheme.kind == "ternary" else pack_rows(codes, scheme.bits))
    whole = torch.cat(packed)
    shape = torch.tensor(grid.shape, dtype=torch.int32)
    zero_points = [] if grid.zero is None else [pack_rows(grid.zero.int(), scheme.bits)]
    return [pack_base3(whole) if scheme.kind == "ternary" else whole, grid.scale.half(), *zero_points, shape]


# ------------------------------------------------------------------ int8


def _over_rows(weight: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `function` of all rows, a few at a time."""
    return torch.cat(
        [function(part) for part in torch.split(weight, row_chunk(weight.shape[0], weight.shape[1], weight.device))]
    )


def _check_half(largest: Tensor, name: str) -> None:
    if not bool((largest <= _HALF_MAX).all()):
        raise BadInputError(f"tensor {name!r} holds values above fp16's range, which its scales are stored in")


def _row_codes(values: Tensor, scale: Tensor) -> Tensor:
    """Return int8 codes as fp32. Values are rounded to fp16 first, as bitsandbytes does."""
    inverse = torch.where(scale == 0, 0.0, 127.0 / scale)
    return (
        (values.to(torch.float16).float().clamp_(-_HALF_MAX, _HALF_MAX) * inverse[:, None]).round_().clamp_(-127, 127)
    )


def _pack_rows_int8(grid: Grid, weight: Tensor) -> list[Tensor]:
    codes = torch.empty(grid.shape, dtype=torch.int8, device=weight.device)
    chunk = row_chunk(*grid.shape, weight.device)
    for part, scale, target in zip(*(torch.split(each, chunk) for each in (weight, grid.scale, codes)), strict=True):
        target.copy_(_row_codes(part, scale))
    return [codes, grid.scale, torch.zeros((), dtype=torch.uint8)]


# ------------------------------------------------------------------ nf4 and fp4


@lru_cache(maxsize=8)
def _codebook(kind: str, device: torch.device) -> Tensor:
    return torch.tensor(NF4_CODES if kind == "nf4" else FP4_CODES, dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def _midpoints(kind: str) -> tuple[float, ...]:
    ascending = _codebook(kind, torch.device("cpu")).sort().values
    return tuple(((ascending[1:] + ascending[:-1]) / 2).tolist())


def _rank(values: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Return which of the codebook's values in ascending order is nearest to values / scale, as uint8."""
    scaled = values * (1.0 / torch.where(scale.abs() < _TINY, _TINY, scale))
    rank = torch.zeros(scaled.shape, dtype=torch.uint8, device=values.device)
    for midpoint in _midpoints(scheme.kind):  # a third of the time that torch.bucketize takes
        rank += scaled > midpoint
    return rank


def _blocks(weight: Tensor) -> Iterator[Tensor]:
    """Give the blocks (n, 64) of a weight in fp32, a few at a time; the last is padded with zeros."""
    chunk = row_chunk(weight.numel(), BLOCK, weight.device) * BLOCK
    for part in torch.split(weight.reshape(-1), chunk):
        yield F.pad(part.float(), (0, -len(part) % BLOCK)).reshape(-1, BLOCK)


def _four_bit_grid(weight: Tensor, scheme: Scheme) -> Grid:
    absmax = torch.cat([blocks.abs().amax(dim=1) for blocks in _blocks(weight)])
    shape = (weight.shape[0], weight.shape[1])
    if not scheme.double:
        return Grid(scheme, shape, absmax)
    offset = absmax.mean()
    blocks = F.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(dim=1)
    table = dynamic_map(weight.device)
    codes = torch.bucketize(blocks * (1.0 / largest.clamp_min(_TINY))[:, None], (table[1:] + table[:-1]) / 2)
    nested = Nested(codes.flatten()[: len(absmax)].to(torch.uint8), largest, float(offset))
    return Grid(
        scheme, shape, unpack_absmax(nested.codes, nested.absmax, table, nested.offset, NESTED_BLOCK), None, nested
    )


def dynamic_map(device: torch.device) -> Tensor:
    """Return the 256 values in -1 … 1 of the 8 bit dynamic type (https://arxiv.org/abs/1511.04561), ascending.

    0 and 1, and either sign of 10^(i - 6) times the middles of 2^i equal parts of 0.1 … 1, for i from 0 to 6.
    """
    parts = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
    sizes = torch.cat([10 ** (i - 6) * ((ends[1:] + ends[:-1]) / 2) for i, ends in enumerate(parts)])
    return torch.cat([sizes, -sizes, torch.tensor([0.0, 1.0])]).sort().values.to(device)


def unpack_absmax(codes: Tensor, absmax: Tensor, table: Tensor, offset: float, block: int) -> Tensor:
    """Return absmax (blocks,) from their codes, the scale of each `block` of them, and what was subtracted."""
    return table[codes.int()].mul_(absmax.repeat_interleave(block)[: len(codes)]).add_(offset)


def _pack_four_bit(grid: Grid, weight: Tensor, info: TensorInfo) -> list[Tensor]:
    scheme, device = grid.scheme, weight.device
    packed = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8, device=device)
    order = torch.tensor(_FP4_ASCENDING, dtype=torch.uint8, device=device)
    done = 0
    for blocks in _blocks(weight):
        scale = grid.scale[done // BLOCK : done // BLOCK + len(blocks), None]
        nibbles = _rank(blocks, scale, scheme)
        nibbles = (order[nibbles.int()] if scheme.kind == "fp4" else nibbles).reshape(-1, 2)
        target = packed[done // 2 : (done + blocks.numel()) // 2, 0]
        target.copy_(((nibbles[:, 0] << 4) | nibbles[:, 1])[: len(target)])
        done += blocks.numel()
    nested, offset = [], 0.0
    if grid.nested is not None:
        nested, offset = [grid.nested.absmax, dynamic_map(device)], grid.nested.offset
    state = torch.frombuffer(bytearray(quant_state_json(info, scheme.name, offset)), dtype=torch.uint8)
    absmax = grid.scale if grid.nested is None else grid.nested.codes
    return [packed, absmax, _codebook(scheme.kind, device).clone(), *nested, state]
