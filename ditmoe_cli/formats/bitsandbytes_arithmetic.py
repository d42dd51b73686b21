"""Rounding, packing and unpacking as bitsandbytes does, in its arithmetic: NF4, FP4 and int8.

bitsandbytes itself is not needed; its kernels unpack where they are right and faster (`bitsandbytes_kernel`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.base import Grid, NumberFormat
from ditmoe_cli.formats.bitsandbytes_kernel import FourBitTensors, unpack_fastest
from ditmoe_cli.formats.columns import Columns
from ditmoe_cli.formats.packing import row_chunk
from ditmoe_cli.formats.scaling import (
    HALF_MAX,
    SCALE_ERROR,
    Rescaled,
    grouped,
    largest_of_rows,
    require_half_range,
    require_small_loss,
    row_chunks,
)
from ditmoe_cli.formats.scratch import scratch
from ditmoe_cli.formats.trained_parts import group_products
from ditmoe_cli.formats.unpacking import fill_rows

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
_FP4_ASCENDING = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)  # bitsandbytes has 8, the other 0, above 0
_CODES = {"nf4": NF4_CODES, "fp4": FP4_CODES}
_TINY = 1e-38  # the least divisor that bitsandbytes takes
_CELLS = 1024  # into which -1 … 1 is cut: FP4's midpoints lie as close as 1 / 384
_NESTED_ERROR = 2.0**-4  # by which double quantisation of scales may change a weight, relative to its norm


# ------------------------------------------------------------------ nf4 and fp4


@dataclass(frozen=True)
class Nested:
    """Absmax under double quantisation: codes (blocks,), the scale of each 256 of them, and the offset subtracted."""

    codes: Tensor
    absmax: Tensor
    offset: float


@dataclass(frozen=True)
class FourBitGrid(Grid):
    """Sixteen values for each block of the flattened matrix.

    Attributes:
        kind: nf4 or fp4.
        block: weights in a block.
        scale: absmax (blocks,) as read back from the file, in fp32.
        nested: how `scale` is stored under double quantisation.
        describe: returns bitsandbytes' JSON of a weight, given it and the offset of its absmax.
    """

    kind: str
    block: int
    scale: Tensor
    nested: Nested | None
    describe: Callable[[TensorInfo, float], bytes]

    def round(self, values: Tensor, columns: Tensor) -> Tensor:
        """Return values (out, n) rounded to the nearest that the grids of their `columns` (n,) hold, in fp32."""
        rows = torch.arange(self.shape[0], device=values.device)[:, None]
        scale = self.scale[(rows * self.shape[1] + columns) // self.block]
        return _nearest_codes(values.float() * _inverse_absmax(scale), self.kind).mul_(scale)

    def columns(self, columns: Tensor) -> Columns:
        """Return the grids of `columns` (n,)."""
        rows = torch.arange(self.shape[0], device=columns.device)
        scale = self.scale[(rows * self.shape[1] + columns[:, None]) // self.block]
        return Columns(_RULES[self.kind], (_inverse_absmax(scale), scale))

    def parts(self, weight: Tensor, info: TensorInfo) -> dict[str, Tensor]:
        """Return the tensors that store a weight (out, in), rounded to the nearest, by the part that each plays."""
        codes = {"packed": self._packed(weight), "quant_map": _codebook(self.kind, weight.device).clone()}
        if self.nested is None:
            return codes | {"absmax": self.scale, "state": self._state(info, 0.0)}
        return codes | {
            "absmax": self.nested.codes,
            "nested_absmax": self.nested.absmax,
            "nested_quant_map": dynamic_map(weight.device),
            "state": self._state(info, self.nested.offset),
        }

    def _state(self, info: TensorInfo, offset: float) -> Tensor:
        return torch.frombuffer(bytearray(self.describe(info, offset)), dtype=torch.uint8)

    def _packed(self, weight: Tensor) -> Tensor:
        """Return the codes of a weight, two a byte, the first in the high nibble."""
        packed = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8, device=weight.device)
        inverse_scale = _inverse_absmax(self.scale)
        done = 0
        for blocks in _blocks(weight, self.block):
            inverses = inverse_scale[done // self.block : done // self.block + len(blocks), None]
            scaled = torch.mul(blocks, inverses, out=scratch("scaled", tuple(blocks.shape), weight.device))
            ranks = four_bit_ranks(scaled, self.kind)
            pairs = ranks.view(torch.int16)  # the first of two ranks in the low byte
            pairs = ((pairs << 4) | (pairs >> 8)).bitwise_and_(255)
            if self.kind == "fp4":
                pairs = _fp4_pairs(weight.device).index_select(0, pairs.int())
            target = packed[done // 2 : (done + blocks.numel()) // 2, 0]
            target.copy_(pairs[: len(target)])
            done += blocks.numel()
        return packed


def _nearest_codes(scaled: Tensor, kind: str) -> Tensor:
    """Return the codebook's values nearest to values over absmax, which are overwritten."""
    return _ascending(kind, scaled.device).index_select(0, four_bit_ranks(scaled, kind).int()).reshape(scaled.shape)


def _round_nf4(values: Tensor, inverse_scale: Tensor, scale: Tensor) -> None:
    """Overwrite values by the nearest of NF4 times absmax."""
    torch.mul(_nearest_codes(values * inverse_scale, "nf4"), scale, out=values)


def _round_fp4(values: Tensor, inverse_scale: Tensor, scale: Tensor) -> None:
    """Overwrite values by the nearest of FP4 times absmax."""
    torch.mul(_nearest_codes(values * inverse_scale, "fp4"), scale, out=values)


_RULES = {"nf4": _round_nf4, "fp4": _round_fp4}


def four_bit_grid(
    fmt: NumberFormat,
    kind: str,
    weight: Tensor,
    describe: Callable[[TensorInfo, float], bytes],
    *,
    name: str,
    block: int,
    nested_block: int,
) -> FourBitGrid:
    """Return the grid of a weight (out, in): absmax of each block, quantised themselves if `nested_block` is not 0.

    Raises `BadInputError` that names the weight `name` where values exceed fp32, or absmax are lost.
    """
    absmax = torch.cat([_magnitudes(blocks).amax(dim=1) for blocks in _blocks(weight, block)])
    if not bool(absmax.isfinite().all()):
        raise BadInputError(f"tensor {name!r} holds values above fp32's range, which its scales are stored in")
    shape = (weight.shape[0], weight.shape[1])
    if not nested_block:
        grid = FourBitGrid(fmt, shape, kind, block, absmax, None, describe)
    else:
        nested = _nested(absmax, nested_block)
        table = dynamic_map(weight.device)
        scale = unpack_absmax(nested.codes, nested.absmax, table, nested.offset, nested_block)
        grid = FourBitGrid(fmt, shape, kind, block, scale, nested, describe)
    _require_absmax(grid, absmax, weight, name)
    return grid


def _magnitudes(values: Tensor) -> Tensor:
    """Return |w|, which holds until the next call in this thread."""
    return torch.abs(values, out=scratch("scaled", tuple(values.shape), values.device))


def _nested(absmax: Tensor, nested_block: int) -> Nested:
    """Return absmax (blocks,) quantised to 8 bits, in blocks of `nested_block`."""
    offset = absmax.mean()
    blocks = F.pad(absmax - offset, (0, -len(absmax) % nested_block)).reshape(-1, nested_block)
    largest = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / largest.clamp_min(_TINY))[:, None]
    return Nested(nearest_dynamic(scaled.reshape(-1)[: len(absmax)]), largest, float(offset))


def nearest_dynamic(values: Tensor) -> Tensor:
    """Return which of the values of `dynamic_map` is nearest to each of `values` (n,), the lower of two, as uint8.

    That is the number of midpoints below, found as in `four_bit_ranks`. Cells hold the values of equal first 16 bits;
    midpoints lie further apart.
    """
    below, midpoint = _dynamic_cells(values.device)
    cell = _dynamic_cell(values)
    above = (values > midpoint.index_select(0, cell)).to(torch.uint8)
    return above.add_(below.index_select(0, cell))


def _dynamic_cell(values: Tensor) -> Tensor:
    """Return the number of the cell of each value, 0 … 2^16 - 1, which rises with the value."""
    bits = values.contiguous().view(torch.int32)
    ordered = bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)  # negative values fall as their bits rise
    return (ordered >> 16).add_(1 << 15)


@lru_cache(maxsize=8)
def _dynamic_cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how many midpoints lie in cells below each cell, as uint8, and the midpoint in it, infinite for none."""
    table = dynamic_map(torch.device("cpu"))
    midpoints = (table[1:] + table[:-1]) / 2
    return _counted_midpoints(midpoints, _dynamic_cell(midpoints), 1 << 16, device)


def _counted_midpoints(midpoints: Tensor, cell: Tensor, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how many of the ascending `midpoints` lie in cells below each, and the midpoint in it, infinite for none.

    `cell` is that of each midpoint; no two may share one.
    """
    below = torch.searchsorted(cell, torch.arange(cells, dtype=cell.dtype)).to(torch.uint8)
    own = torch.full((cells,), torch.inf).index_put_((cell.long(),), midpoints)
    return below.to(device), own.to(device)


def _require_absmax(grid: FourBitGrid, absmax: Tensor, weight: Tensor, name: str) -> None:
    """Raise `BadInputError` that names a weight (out, in) whose `absmax` (blocks,) are lost.

    Below `_TINY` an absmax does not divide; double quantisation may lose those of an odd distribution. Its own rounding
    is coarser than that of fp16 scales, and allowed.
    """
    sizes = absmax.double()
    lost = torch.where(sizes > 0, grid.scale.double() / sizes - 1, 0.0)
    lost = torch.where((sizes > 0) & (sizes < _TINY), 1.0, lost)

    def energies() -> Tensor:
        return torch.cat([blocks.double().square_().sum(dim=1) for blocks in _blocks(weight, grid.block)])

    most = SCALE_ERROR if grid.nested is None else _NESTED_ERROR
    Rescaled(name, grid.format.name, lost, absmax, grid.block).require_small(energies, most)


def dynamic_map(device: torch.device) -> Tensor:
    """Return the 256 values in -1 … 1 of the 8 bit dynamic type (https://arxiv.org/abs/1511.04561), ascending.

    0 and 1, and either sign of 10^(i - 6) times the middles of 2^i equal parts of 0.1 … 1, for i from 0 to 6.
    """
    parts = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
    sizes = torch.cat([10 ** (i - 6) * ((ends[1:] + ends[:-1]) / 2) for i, ends in enumerate(parts)])
    return torch.cat([sizes, -sizes, torch.tensor([0.0, 1.0])]).sort().values.to(device)


def unpack_absmax(codes: Tensor, absmax: Tensor, table: Tensor, offset: float, block: int) -> Tensor:
    """Return absmax (blocks,): values of `codes` by `table`, times the scale of each `block` of them, plus `offset`."""
    values = F.pad(table.index_select(0, codes.int()), (0, -len(codes) % block)).reshape(-1, block)
    return values.mul_(absmax[:, None]).reshape(-1)[: len(codes)].add_(offset)


def code_pairs(codes: Tensor) -> Tensor:
    """Return the two fp32 weights that each byte stands for, high nibble first, as 256 eight-byte cells.

    Looking bytes up in cells that hold both weights is about twice as fast as looking up each nibble. The cells
    pose as integers, which ``module.to(dtype)`` leaves alone.
    """
    return torch.cartesian_prod(codes, codes).view(torch.int64).reshape(-1)


def unpack_four_bit(packed: Tensor, absmax: Tensor, pairs: Tensor, block: int, out: Tensor) -> None:
    """Write a weight into `out` (out, in): code values by the table `pairs`, times the absmax of their `block`."""
    if not out.is_contiguous():
        whole = torch.empty_like(out, memory_format=torch.contiguous_format)
        unpack_four_bit(packed, absmax, pairs, block, whole)
        out.copy_(whole)
        return
    codes, flat = packed.reshape(-1), out.view(-1)
    blocks = len(flat) // block

    def compute(values: Tensor, part: slice, before: int = 0) -> None:
        """Write the values of blocks, `before` of which lie before the first that is counted."""
        first, size = (before + part.start) * block // 2, values.numel()
        index = scratch("places", (-(-size // 2),), out.device, torch.int32)
        index.copy_(codes[first : first + len(index)])
        if size % 2:  # a last byte holds one weight
            values.view(-1).copy_(pairs.index_select(0, index).view(torch.float32)[:size])
        else:
            torch.index_select(pairs, 0, index, out=values.view(-1).view(pairs.dtype))
        values.mul_(absmax[before + part.start : before + part.stop, None])

    fill_rows(flat[: blocks * block].view(blocks, block), compute)
    if len(flat) > blocks * block:
        fill_rows(flat[None, blocks * block :], lambda values, part: compute(values, part, blocks))


def unpack_four_bit_weight(
    tensors: Mapping[str, Tensor], out: Tensor, *, kind: str, usual: bool, block: int, nested_block: int, offset: float
) -> None:
    """Write the weight of `tensors` ``packed``, ``absmax`` and ``pairs`` into `out`.

    With a `nested_block`, absmax are unpacked first, by ``nested_absmax`` and ``nested_quant_map``. A codebook that is
    not the `usual` one of its `kind` is unpacked by ours.
    """
    packed, absmax, pairs = tensors["packed"], tensors["absmax"], tensors["pairs"]
    if nested_block:
        scales, table = tensors["nested_absmax"], tensors["nested_quant_map"]
        absmax = unpack_absmax(absmax, scales, table, offset, nested_block)

    def ours(target: Tensor) -> None:
        unpack_four_bit(packed, absmax, pairs, block, target)

    if usual:
        unpack_fastest(ours, FourBitTensors(packed, absmax, kind, block), out)
    else:
        ours(out)


def is_usual(codes: Tensor, kind: str) -> bool:
    """Return whether `codes` (16,) are the codebook of a kind, to the bit."""
    return torch.equal(codes, _codebook(kind, codes.device))


@lru_cache(maxsize=8)
def _ascending(kind: str, device: torch.device) -> Tensor:
    return _codebook(kind, device).sort().values


@lru_cache(maxsize=8)
def _codebook(kind: str, device: torch.device) -> Tensor:
    return torch.tensor(_CODES[kind], dtype=torch.float32, device=device)


def _inverse_absmax(scale: Tensor) -> Tensor:
    """Return 1 / absmax, with the least divisor that bitsandbytes takes."""
    return 1.0 / torch.where(scale.abs() < _TINY, _TINY, scale)


def four_bit_ranks(scaled: Tensor, kind: str) -> Tensor:
    """Return which of the codebook's values in ascending order is nearest to values over absmax, the lower of two.

    That is the number of midpoints m with m < x, as uint8. Cells of equal width hold one of them at most: a table tells
    how many lie in the cells below, and one comparison whether that of the cell itself is below x. The cell of x rises
    with x however it is rounded, so the number is exact. Overwrites `scaled`; ranks hold until the next call in this
    thread.
    """
    below, midpoint = _cells(kind, scaled.device)
    size, device, flat = scaled.numel(), scaled.device, scaled.reshape(-1)
    places = _place(flat, scratch("places", (size,), device))
    cell = scratch("cells", (size,), device, torch.int32).copy_(places)
    own = torch.index_select(midpoint, 0, cell, out=places)
    ranks = torch.index_select(below, 0, cell, out=scratch("ranks", (size,), device, torch.uint8))
    return ranks.add_(scratch("above", (size,), device, torch.int8).copy_(flat.gt_(own)).view(torch.uint8))


def _place(scaled: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the cell of each value as fp32, its fraction still to be cut off.

    Cells of values in -1 … 1 have equal width; the outer ones hold all that lies beyond.
    """
    middle = _CELLS // 2
    return torch.add(torch.tensor(float(middle)), scaled, alpha=middle, out=out).clamp_(0, _CELLS - 1)


@lru_cache(maxsize=8)
def _cells(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how many midpoints lie in cells below each cell, as uint8, and the midpoint in it, infinite for none."""
    ascending = _codebook(kind, torch.device("cpu")).sort().values
    midpoints = (ascending[1:] + ascending[:-1]) / 2
    return _counted_midpoints(midpoints, _place(midpoints).int(), _CELLS, device)


@lru_cache(maxsize=8)
def _fp4_pairs(device: torch.device) -> Tensor:
    """Return the byte of two FP4 codes for that of their ranks in ascending order."""
    order = torch.tensor(_FP4_ASCENDING, dtype=torch.uint8)
    return (order[:, None] * 16 + order).reshape(-1).to(device)


def _blocks(weight: Tensor, block: int) -> Iterator[Tensor]:
    """Yield the blocks (n, block) of a weight in fp32, a few at a time; the last is padded with zeros.

    They may be the weight itself, and otherwise hold until the next ones are asked for.
    """
    chunk = row_chunk(weight.numel(), block, weight.device) * block
    for part in torch.split(weight.reshape(-1), chunk):
        yield grouped(part[None], block)[0]


# ------------------------------------------------------------------ int8


@dataclass(frozen=True)
class Int8Grid(Grid):
    """255 values for each row; `scale` (out,) is the largest |w| of a row, in fp32."""

    scale: Tensor

    def round(self, values: Tensor, columns: Tensor) -> Tensor:  # noqa: ARG002
        """Return values (out, n) rounded to the nearest that their rows can hold, in fp32, whatever their columns."""
        return _row_codes(_half_values(values), _inverse_step(self.scale)).mul_((self.scale / 127.0)[:, None])

    def columns(self, columns: Tensor) -> Columns:
        """Return the grids of `columns` (n,)."""
        numbers = (_inverse_step(self.scale), self.scale / 127.0)
        return Columns(_round_halves, tuple(number.expand(len(columns), -1) for number in numbers))

    def parts(self, weight: Tensor, info: TensorInfo) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the tensors that store a weight (out, in), rounded to the nearest, by the part that each plays."""
        codes = torch.empty(self.shape, dtype=torch.int8, device=weight.device)
        chunk = row_chunk(*self.shape, weight.device)
        pieces = (torch.split(each, chunk) for each in (weight, _inverse_step(self.scale), codes))
        for part, inverse_step, target in zip(*pieces, strict=True):
            exact = scratch("scaled", tuple(part.shape), part.device)
            exact.copy_(part if part.dtype == torch.float16 else _half_values(part))
            target.copy_(_row_codes(exact, inverse_step))
        return {"packed": codes, "scale": self.scale, "form": torch.zeros((), dtype=torch.uint8)}


def _round_halves(values: Tensor, inverse_step: Tensor, step: Tensor) -> None:
    """Overwrite values by the nearest of -127 … 127 steps, having rounded them to fp16."""
    values.copy_(_half_values(values)).mul_(inverse_step).round_().clamp_(-127, 127).mul_(step)


def int8_grid(fmt: NumberFormat, weight: Tensor, name: str) -> Int8Grid:
    """Return the grid of a weight (out, in).

    Raises `BadInputError` that names the weight `name` where fp16 does not hold its values, or changes them too much.
    """
    largest = largest_of_rows(weight)
    scale = largest.half().float()
    require_half_range(scale, name)
    if not _kept_by_half(weight, largest):
        loss = energy = 0.0
        for part in row_chunks(weight):
            exact = part.double()
            loss += float((exact - part.half().double()).square_().sum())
            energy += float(exact.square_().sum())
        require_small_loss(loss, energy, name, fmt.name)
    return Int8Grid(fmt, (weight.shape[0], weight.shape[1]), scale)


def _kept_by_half(weight: Tensor, largest: Tensor) -> bool:
    """Return whether fp16 surely keeps a weight to `SCALE_ERROR`, by the `largest` |w| of its rows.

    It rounds by up to 2^-11 of a value, and by up to 2^-25 where that is more. The squared norm is at least that of the
    largest values.
    """
    if weight.dtype == torch.float16:
        return True
    least = float(largest.double().square().sum())
    return weight.numel() * 2.0**-50 <= (SCALE_ERROR**2 - 2.0**-20) * least


def _inverse_step(scale: Tensor) -> Tensor:
    """Return how many codes a unit of each row takes, 127 / s, and 0 for rows of zeros."""
    return torch.where(scale == 0, 0.0, 127.0 / scale)


def _half_values(values: Tensor) -> Tensor:
    """Return fp16's values in fp32, to which bitsandbytes rounds first."""
    return values.to(torch.float16).float().clamp_(-HALF_MAX, HALF_MAX)


def _row_codes(exact: Tensor, inverse_step: Tensor) -> Tensor:
    """Replace fp16's values (out, n) by their int8 codes, as fp32."""
    return exact.mul_(inverse_step[:, None]).round_().clamp_(-127, 127)


def unpack_int8(tensors: Mapping[str, Tensor], out: Tensor) -> None:
    """Write the weight of `tensors` ``packed`` and ``scale`` into `out`: code times row scale / 127, in fp32."""
    packed, scale = tensors["packed"], (tensors["scale"] / 127.0)[:, None]
    fill_rows(out, lambda values, part: values.copy_(packed[part]).mul_(scale[part]))


def composed_four_bit(
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Tensor],
    *,
    shape: tuple[int, ...],
    block: int,
    nested_block: int,
    offset: float,
) -> Tensor:
    """Return the matrix of `numbers` by part, ``absmax`` or ``nested_absmax``, with gradients to them.

    `tensors` are what is stored, by part, and the `code_pairs`.
    """
    if nested_block:
        table = tensors["nested_quant_map"].index_select(0, tensors["absmax"].int())
        absmax = group_products(table[None], numbers["nested_absmax"][None], nested_block) + offset
    else:
        absmax = numbers["absmax"][None]
    values = tensors["pairs"].index_select(0, tensors["packed"].reshape(-1).int()).view(torch.float32)
    return group_products(values[None, : math.prod(shape)], absmax, block).view(shape)


def composed_int8(packed: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
    """Return the matrix of `packed` codes and of the ``scale`` (out,) of rows among `numbers`, with gradients to it."""
    return packed.float() * (numbers["scale"] / 127.0)[:, None]
