"""Rounding, packing and unpacking as bitsandbytes does, in its arithmetic: NF4, FP4 and int8.

bitsandbytes itself is not needed. On the CPU it must not unpack: its kernels are wrong for some shapes, and its modules
alter their state on the first forward pass (docs/design.md).
"""

from __future__ import annotations

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
from ditmoe_cli.formats.packing import row_chunk
from ditmoe_cli.formats.scaling import (
    HALF_MAX,
    SCALE_ERROR,
    over_rows,
    require_half_range,
    require_small_loss,
    row_chunks,
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
_FP4_ASCENDING = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)  # bitsandbytes has 8, the other 0, above 0
_CODES = {"nf4": NF4_CODES, "fp4": FP4_CODES}
_TINY = 1e-38  # the least divisor that bitsandbytes takes
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
        values = values.float()
        rows = torch.arange(self.shape[0], device=values.device)[:, None]
        scale = self.scale[(rows * self.shape[1] + columns) // self.block]
        ascending = _codebook(self.kind, values.device).sort().values
        return ascending[_rank(values, scale, self.kind).int()].mul_(scale)

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
        order = torch.tensor(_FP4_ASCENDING, dtype=torch.uint8, device=weight.device)
        done = 0
        for blocks in _blocks(weight, self.block):
            scale = self.scale[done // self.block : done // self.block + len(blocks), None]
            nibbles = _rank(blocks, scale, self.kind)
            nibbles = (order[nibbles.int()] if self.kind == "fp4" else nibbles).reshape(-1, 2)
            target = packed[done // 2 : (done + blocks.numel()) // 2, 0]
            target.copy_(((nibbles[:, 0] << 4) | nibbles[:, 1])[: len(target)])
            done += blocks.numel()
        return packed


def four_bit_grid(
    fmt: NumberFormat,
    kind: str,
    weight: Tensor,
    describe: Callable[[TensorInfo, float], bytes],
    *,
    block: int,
    nested_block: int,
) -> FourBitGrid:
    """Return the grid of a weight (out, in): absmax of each block, quantised themselves if `nested_block` is not 0."""
    absmax = torch.cat([blocks.abs().amax(dim=1) for blocks in _blocks(weight, block)])
    shape = (weight.shape[0], weight.shape[1])
    if not nested_block:
        return FourBitGrid(fmt, shape, kind, block, absmax, None, describe)
    offset = absmax.mean()
    blocks = F.pad(absmax - offset, (0, -len(absmax) % nested_block)).reshape(-1, nested_block)
    largest = blocks.abs().amax(dim=1)
    table = dynamic_map(weight.device)
    codes = torch.bucketize(blocks * (1.0 / largest.clamp_min(_TINY))[:, None], (table[1:] + table[:-1]) / 2)
    nested = Nested(codes.flatten()[: len(absmax)].to(torch.uint8), largest, float(offset))
    scale = unpack_absmax(nested.codes, nested.absmax, table, nested.offset, nested_block)
    return FourBitGrid(fmt, shape, kind, block, scale, nested, describe)


def require_absmax(grid: FourBitGrid, weight: Tensor, name: str) -> None:
    """Raise `BadInputError` that names a weight with values beyond fp32, or whose absmax are lost.

    Below `_TINY` an absmax does not divide; double quantisation may lose those of an odd distribution. Its own rounding
    is coarser than that of fp16 scales, and allowed.
    """
    loss = energy = 0.0
    done = 0
    for blocks in _blocks(weight, grid.block):
        absmax = blocks.abs().amax(dim=1).double()
        stored = grid.scale[done : done + len(blocks)].double()
        if not bool(absmax.isfinite().all()):
            raise BadInputError(f"tensor {name!r} holds values above fp32's range, which its scales are stored in")
        lost = torch.where(absmax > 0, stored / absmax - 1, 0.0)
        lost = torch.where((absmax > 0) & (absmax < _TINY), 1.0, lost)
        squares = blocks.double().square_().sum(dim=1)
        loss += float((squares * lost.square()).sum())
        energy += float(squares.sum())
        done += len(blocks)
    require_small_loss(loss, energy, name, grid.format.name, SCALE_ERROR if grid.nested is None else _NESTED_ERROR)


def dynamic_map(device: torch.device) -> Tensor:
    """Return the 256 values in -1 … 1 of the 8 bit dynamic type (https://arxiv.org/abs/1511.04561), ascending.

    0 and 1, and either sign of 10^(i - 6) times the middles of 2^i equal parts of 0.1 … 1, for i from 0 to 6.
    """
    parts = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
    sizes = torch.cat([10 ** (i - 6) * ((ends[1:] + ends[:-1]) / 2) for i, ends in enumerate(parts)])
    return torch.cat([sizes, -sizes, torch.tensor([0.0, 1.0])]).sort().values.to(device)


def unpack_absmax(codes: Tensor, absmax: Tensor, table: Tensor, offset: float, block: int) -> Tensor:
    """Return absmax (blocks,): values of `codes` by `table`, times the scale of each `block` of them, plus `offset`."""
    return table[codes.int()].mul_(absmax.repeat_interleave(block)[: len(codes)]).add_(offset)


def code_pairs(codes: Tensor) -> Tensor:
    """Return the two fp32 weights that each byte stands for, high nibble first, as 256 eight-byte cells.

    Looking bytes up in cells that hold both weights is about twice as fast as looking up each nibble. The cells
    pose as integers, which ``module.to(dtype)`` leaves alone.
    """
    return torch.cartesian_prod(codes, codes).view(torch.int64).reshape(-1)


def unpack_four_bit(packed: Tensor, absmax: Tensor, pairs: Tensor, shape: tuple[int, ...], block: int) -> Tensor:
    """Return the fp32 weight of `shape`: code values by the table `pairs`, times the absmax of their `block`."""
    values = pairs.index_select(0, packed.reshape(-1).int()).view(torch.float32)
    if values.numel() % block == 0:
        return values.reshape(-1, block).mul_(absmax[:, None]).reshape(shape)
    return values.mul_(absmax.repeat_interleave(block)[: values.numel()]).reshape(shape)


def unpack_four_bit_weight(
    tensors: Mapping[str, Tensor], *, kind: str, shape: tuple[int, ...], block: int, nested_block: int, offset: float
) -> Tensor:
    """Return the fp32 weight of `tensors` ``packed``, ``absmax`` and ``pairs``.

    With a `nested_block`, absmax are unpacked first, by ``nested_absmax`` and ``nested_quant_map``.
    """
    packed, absmax, pairs = tensors["packed"], tensors["absmax"], tensors["pairs"]
    if nested_block:
        scales, table = tensors["nested_absmax"], tensors["nested_quant_map"]
        absmax = unpack_absmax(absmax, scales, table, offset, nested_block)
    codes = pairs.view(torch.float32).reshape(-1, 2)[:16, 1]

    def ours() -> Tensor:
        return unpack_four_bit(packed, absmax, pairs, shape, block)

    return unpack_fastest(ours, FourBitTensors(packed, absmax, codes, kind, tuple(shape), block))


@lru_cache(maxsize=8)
def _codebook(kind: str, device: torch.device) -> Tensor:
    return torch.tensor(_CODES[kind], dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def _midpoints(kind: str) -> tuple[float, ...]:
    ascending = _codebook(kind, torch.device("cpu")).sort().values
    return tuple(((ascending[1:] + ascending[:-1]) / 2).tolist())


def _rank(values: Tensor, scale: Tensor, kind: str) -> Tensor:
    """Return which of the codebook's values in ascending order is nearest to values / scale, as uint8."""
    scaled = values * (1.0 / torch.where(scale.abs() < _TINY, _TINY, scale))
    rank = torch.zeros(scaled.shape, dtype=torch.uint8, device=values.device)
    for midpoint in _midpoints(kind):  # a third of the time that torch.bucketize takes
        rank += scaled > midpoint
    return rank


def _blocks(weight: Tensor, block: int) -> Iterator[Tensor]:
    """Yield the blocks (n, block) of a weight in fp32, a few at a time; the last is padded with zeros."""
    chunk = row_chunk(weight.numel(), block, weight.device) * block
    for part in torch.split(weight.reshape(-1), chunk):
        yield F.pad(part.float(), (0, -len(part) % block)).reshape(-1, block)


# ------------------------------------------------------------------ int8


@dataclass(frozen=True)
class Int8Grid(Grid):
    """255 values for each row; `scale` (out,) is the largest |w| of a row, in fp32."""

    scale: Tensor

    def round(self, values: Tensor, columns: Tensor) -> Tensor:  # noqa: ARG002
        """Return values (out, n) rounded to the nearest that their rows can hold, in fp32, whatever their columns."""
        return _row_codes(values.float(), self.scale).mul_((self.scale / 127.0)[:, None])

    def parts(self, weight: Tensor, info: TensorInfo) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the tensors that store a weight (out, in), rounded to the nearest, by the part that each plays."""
        codes = torch.empty(self.shape, dtype=torch.int8, device=weight.device)
        chunk = row_chunk(*self.shape, weight.device)
        for part, scale, target in zip(*(torch.split(t, chunk) for t in (weight, self.scale, codes)), strict=True):
            target.copy_(_row_codes(part, scale))
        return {"packed": codes, "scale": self.scale, "form": torch.zeros((), dtype=torch.uint8)}


def require_half_values(weight: Tensor, name: str, fmt: str) -> None:
    """Raise `BadInputError` that names a weight whose values fp16 does not hold, or changes too much."""
    require_half_range(over_rows(weight, lambda part: part.to(torch.float16).float().abs().amax(dim=1)), name)
    loss = energy = 0.0
    for part in row_chunks(weight):
        exact = part.double()
        loss += float((exact - part.half().double()).square_().sum())
        energy += float(exact.square_().sum())
    require_small_loss(loss, energy, name, fmt)


def int8_grid(fmt: NumberFormat, weight: Tensor) -> Int8Grid:
    """Return the grid of a weight (out, in) that fp16 holds."""
    scale = over_rows(weight, lambda part: part.to(torch.float16).float().abs().amax(dim=1))
    return Int8Grid(fmt, (weight.shape[0], weight.shape[1]), scale)


def _row_codes(values: Tensor, scale: Tensor) -> Tensor:
    """Return int8 codes as fp32. Values are rounded to fp16 first, as bitsandbytes does."""
    inverse = torch.where(scale == 0, 0.0, 127.0 / scale)
    return (values.to(torch.float16).float().clamp_(-HALF_MAX, HALF_MAX) * inverse[:, None]).round_().clamp_(-127, 127)


def unpack_int8(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the fp32 weight of `tensors` ``packed`` and ``scale``: code times row scale / 127."""
    return tensors["packed"].float().mul_((tensors["scale"] / 127.0)[:, None])
