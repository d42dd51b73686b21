"""Quantised weights in torch: packing, our own dequantiser, and linear layers that keep their weights packed.

The dequantiser is ours because bitsandbytes' CPU kernels are wrong for some shapes and alter a module's
state on its first forward; see docs/design.md. How weights are rounded to formats is in `model.grids`, how they are
laid out in `checkpoint.formats`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.reader import torch_dtype
from ditmoe_cli.formats.differences import restored
from ditmoe_cli.formats.grids import grid_of, pack_on, unpack_absmax
from ditmoe_cli.formats.kernels import four_bit
from ditmoe_cli.formats.packing import base3_digits, check_base3, row_chunk, unpack_rows, unpack_values
from ditmoe_cli.formats.weights import Format, Scheme, Weight, parse_format, parse_pieces, parse_quant_state


def pack(weight: Tensor, info: TensorInfo, fmt: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Quantise a weight (out, in); return its members by name, as `formats.quantized_members` lays them out.

    `importance` (in,) weighs the columns where scales are searched for; see `grids.grid_of`, whose errors it raises.
    """
    return pack_on(grid_of(weight, fmt, importance, name=info.name), weight, info, fmt)


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


def unpack_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 weight: code times row scale / 127."""
    return codes.float().mul_((scale / 127.0)[:, None])


def unpack_uniform(
    packed: Tensor, scale: Tensor, zero: Tensor | None, shape: tuple[int, ...], scheme: Scheme
) -> Tensor:
    """Return the fp32 weight: (code - zero) times the scale of its group, a few rows at a time."""
    rows, columns = shape
    values = torch.empty(rows, columns, device=packed.device)
    middle = float(2 ** (scheme.bits - 1))
    zeros = None if zero is None else unpack_rows(zero, scale.shape[1], scheme.bits).float()
    chunk = row_chunk(rows, columns, packed.device)
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        values[part] = unpack_values(packed[part], columns, scheme.bits)
        _to_weights(values[part], scale[part].float(), middle if zeros is None else zeros[part], scheme.group)
    return values


def unpack_ternary(packed: Tensor, scale: Tensor, shape: tuple[int, ...], scheme: Scheme) -> Tensor:
    """Return the fp32 weight: code times the scale of its group."""
    values = base3_digits(packed, torch.float32)[: shape[0] * shape[1]].reshape(shape)
    _to_weights(values, scale.float(), None, scheme.group)
    return values


def _to_weights(values: Tensor, scale: Tensor, zero: Tensor | float | None, group: int) -> None:
    """Replace codes (rows, n) by weights, (code - zero) · scale with one scale and zero a group (rows, groups)."""
    whole = values.shape[1] // group
    pieces = [(values[:, : whole * group].view(-1, whole, group), slice(0, whole))] if whole else []
    if values.shape[1] > whole * group:
        pieces.append((values[:, None, whole * group :], slice(whole, whole + 1)))
    for piece, groups in pieces:
        if zero is not None:
            piece.sub_(zero[:, groups, None] if isinstance(zero, Tensor) else zero)
        piece.mul_(scale[:, groups, None])


class QuantizedLinear(nn.Module):
    """A linear layer that keeps its weight packed and unpacks it for each multiplication.

    Members are buffers under the names of their scheme's parts; `load_members` fills them from a checkpoint. Floating
    ones are kept as the bits of their values, so that ``module.to(dtype)`` does not round them.
    """

    packed: Tensor
    absmax: Tensor
    pairs: Tensor
    _KEPT = ("packed", "scale", "zero_point", "absmax", "nested_absmax", "nested_quant_map")

    def __init__(self, weight: Weight, bias: bool) -> None:
        super().__init__()
        self.scheme = parse_format(weight.format)
        self.format = weight.format
        self.shape = weight.info.shape
        self.block = self.nested_block = 0
        self.offset = 0.0
        self.kept = [part for part in self.scheme.parts if part in self._KEPT]
        for name in (*self.kept, "pairs"):
            self.register_buffer(name, torch.empty(0))
        self.bias = nn.Parameter(torch.empty(self.shape[0]), requires_grad=False) if bias else None

    def load_members(self, members: Mapping[str, Tensor], weight: Weight) -> None:
        """Take over the packed tensors of `weight`.

        Raises `BadInputError` that names a tensor whose bytes stand for no codes, or describe none.
        """
        names = dict(zip(self.scheme.parts, weight.members, strict=True))
        for part in self.kept:
            setattr(self, part, _bits(members[names[part]]))
        if "state" in names:
            state = parse_quant_state(bytes(members[names["state"]].tolist()), names["state"])
            self.block, self.nested_block, self.offset = state.block, state.nested_block, state.offset
            self.pairs = code_pairs(members[names["quant_map"]])
        if self.scheme.kind == "ternary":
            try:
                check_base3(members[names["packed"]], self.shape)
            except BadInputError as error:
                raise BadInputError(f"tensor {names['packed']!r}: {error}") from None

    def _floats(self, part: str) -> Tensor:
        bits: Tensor = getattr(self, part)
        return bits.view(torch.float16 if bits.dtype == torch.int16 else torch.float32)

    def weight(self) -> Tensor:
        """Return the unpacked weight (out, in) in fp32."""
        if self.scheme.kind == "int8":
            return unpack_int8(self.packed, self._floats("scale"))
        if self.scheme.kind == "ternary":
            return unpack_ternary(self.packed, self._floats("scale"), self.shape, self.scheme)
        if self.scheme.kind == "uniform":
            zero: Tensor | None = getattr(self, "zero_point", None)
            return unpack_uniform(self.packed, self._floats("scale"), zero, self.shape, self.scheme)
        absmax, codes = self._absmax(), self.pairs.view(torch.float32).reshape(-1, 2)[:16, 1]
        return four_bit(
            lambda: unpack_four_bit(self.packed, absmax, self.pairs, self.shape, self.block),
            *(self.packed, absmax, codes, self.scheme.kind, tuple(self.shape), self.block),
        )

    def _absmax(self) -> Tensor:
        if not self.scheme.double:
            return self._floats("absmax")
        scales, table = self._floats("nested_absmax"), self._floats("nested_quant_map")
        return unpack_absmax(self.absmax, scales, table, self.offset, self.nested_block)

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b, computed in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight().to(x.dtype), bias)


class PiecedLinear(nn.Module):
    """A linear layer whose weight is kept packed in pieces, and put together for each multiplication.

    Its pieces are layers without a bias; `load_members` fills them from a checkpoint.
    """

    def __init__(self, weight: Weight, bias: bool) -> None:
        super().__init__()
        found = parse_pieces(weight.format or "")
        assert found is not None
        self.format, self.shape, self.layout = weight.format, weight.info.shape, found
        self.pieces = nn.ModuleList(QuantizedLinear(piece, bias=False) for piece in weight.pieces)
        self.bias = nn.Parameter(torch.empty(self.shape[0]), requires_grad=False) if bias else None

    def load_members(self, members: Mapping[str, Tensor], weight: Weight) -> None:
        """Take over the packed tensors of `weight`. Raises `BadInputError` as `QuantizedLinear.load_members` does."""
        for layer, piece in zip(self._layers(), weight.pieces, strict=True):
            layer.load_members(members, piece)

    def _layers(self) -> list[QuantizedLinear]:
        return [layer for layer in self.pieces if isinstance(layer, QuantizedLinear)]

    def weight(self) -> Tensor:
        """Return the unpacked weight (out, in) in fp32."""
        layers = self._layers()
        whole = torch.empty(self.shape, device=layers[0].packed.device)
        for layer, part in zip(layers, self.layout.slices, strict=True):
            whole[part if self.layout.axis == 0 else (slice(None), part)] = layer.weight()
        return whole

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b, computed in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight().to(x.dtype), bias)


def packed_linear(weight: Weight, bias: bool) -> QuantizedLinear | PiecedLinear:
    """Return an empty layer for a quantised weight, in one piece or several."""
    return PiecedLinear(weight, bias) if weight.pieces else QuantizedLinear(weight, bias)


def _bits(tensor: Tensor) -> Tensor:
    """Return floating values as integers of their size."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.view(torch.int16 if tensor.dtype == torch.float16 else torch.int32)


def dequantized(weight: Weight, members: Mapping[str, Tensor]) -> Tensor:
    """Return a quantised weight (out, in) in fp32; `members` are its tensors by name."""
    layer = packed_linear(weight, bias=False)
    layer.load_members(members, weight)
    return layer.weight()


def unpack(weight: Weight, members: dict[str, Tensor]) -> Tensor:
    """Return a weight in its logical dtype, whatever it is stored as; `members` are its tensors by name."""
    if weight.format is None:
        return members[weight.info.name]
    if weight.format in ("svd", "ternary"):
        return restored(weight, members)
    dtype = torch_dtype(weight.info.dtype)
    values = dequantized(weight, members)
    if dtype == torch.float16:  # the last step below fp16's end may be rounded above it
        values.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return values.to(dtype)
