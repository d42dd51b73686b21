"""The layout of SDNQ (https://github.com/Disty0/sdnq, 0.2): integers of 2 to 8 bits, mixed over modules.

A folder holds safetensors and a ``config.json`` whose ``quantization_config`` tells the dtype of each module's codes
(``modules_dtype_dict``), columns of a group where they are not the usual ones, and ranks (``modules_quant_config``).
A linear module X, its weight (out, in) in G groups of g columns, has:

           X.weight         codes q     uint{b}: 0 … 2^b - 1, or int{b}: -2^(b-1) … 2^(b-1) - 1
           X.scale                                      F32  (out, G, 1)     w = zero_point + q * scale
           X.zero_point                                 F32  (out, G, 1)     of uint{b} alone
           X.svd_up, X.svd_down                         F32  (out, r), (r, in)     w is added svd_up svd_down

Where a row is one group, G falls away as a dimension. Codes of 8 bits stand as they are, U8 or I8 (out, G, g). Others,
less their least, are packed over the flattened matrix, several into a unit of bytes: (n,) of one byte, else (n, bytes).

            bits  codes  bytes
              2     4      1     code k in bits 2k and 2k + 1
              3     8      3     byte i: codes i and 3 + i; then bits 0 and 1 of code 6 (i = 0) or 7 (i = 1), or bit 2
                                 of both (i = 2)
              4     2      1     the first code in the low half
              5     8      5     byte i: code i; then bits 0 to 2 of code 5 + i (i < 3), or bits 3 and 4 of code 2 + i
                                 and bit 4 (i = 3) or 3 (i = 4) of code 7
              6     4      3     byte i: code i; then bits 4 and 5 (i = 0), 2 and 3, or 0 and 1 (i = 2) of code 3

Weights are exact in fp32: products of codes and fp16 scales have at most 19 significant bits. Groups that do not divide
a row are divided further, which repeats their scales. An expert that is a base plus a product of factors has the base
as codes of a floating dtype with scales 1, each expert its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ditmoe_cli.exporting.recoded import Recoded
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.base import StoredFormat, Weight
from ditmoe_cli.formats.bitsandbytes import Int8
from ditmoe_cli.formats.differences import SvdDifference
from ditmoe_cli.formats.integer import Integer
from ditmoe_cli.formats.ternary import Ternary

if TYPE_CHECKING:
    from torch import Tensor

FEWEST_COLUMNS = 8  # of a group: in smaller ones scales would take more than the codes
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True)
class _Move:
    """Bits of codes in a unit: `number` of them, from bit `bit` of code `code`, to bit `place` of byte `byte`."""

    code: int
    bit: int
    number: int
    byte: int
    place: int


@dataclass(frozen=True)
class _Packing:
    """How `codes` are packed into `bytes`."""

    codes: int
    bytes: int
    moves: tuple[_Move, ...]


_PACKINGS = {
    2: _Packing(4, 1, tuple(_Move(k, 0, 2, 0, 2 * k) for k in range(4))),
    3: _Packing(
        8,
        3,
        (
            *(_Move(i, 0, 3, i, 0) for i in range(3)),
            *(_Move(3 + i, 0, 3, i, 3) for i in range(3)),
            *(_Move(6 + i, 0, 2, i, 6) for i in range(2)),
            *(_Move(6 + i, 2, 1, 2, 6 + i) for i in range(2)),
        ),
    ),
    4: _Packing(2, 1, (_Move(0, 0, 4, 0, 0), _Move(1, 0, 4, 0, 4))),
    5: _Packing(
        8,
        5,
        (
            *(_Move(i, 0, 5, i, 0) for i in range(5)),
            *(_Move(5 + i, 0, 3, i, 5) for i in range(3)),
            *(_Move(5 + i, 3, 2, 3 + i, 5) for i in range(2)),
            *(_Move(7, 4 - i, 1, 3 + i, 7) for i in range(2)),
        ),
    ),
    6: _Packing(4, 3, (*(_Move(i, 0, 6, i, 0) for i in range(3)), *(_Move(3, 4 - 2 * i, 2, i, 6) for i in range(3)))),
}


def shortfall(info: TensorInfo, fmt: StoredFormat) -> str | None:
    """Return why the layout does not hold the weight `info` in a format; None where it does."""
    if isinstance(fmt, SvdDifference):
        return None if info.dtype in _FLOATS else f"is {info.dtype}, and the layout holds fp32 and less"
    if isinstance(fmt, Int8):
        return None
    if not isinstance(fmt, Integer | Ternary):
        return f"is {fmt.name}, and the layout holds integers of one width a matrix, and low-rank differences"
    if info.numel % 8:
        return f"has {info.numel} values, and the layout packs eight at a time"
    columns = group_columns(info, fmt)
    if columns < min(FEWEST_COLUMNS, info.shape[1]):
        return f"has rows of {info.shape[1]}, which only groups of {columns} divide within those of {fmt.group}"
    return None


def group_columns(info: TensorInfo, fmt: Integer | Ternary) -> int:
    """Return how many columns share a scale in the layout: all groups of a row are equal, and within those of `fmt`."""
    columns = info.shape[1]
    return columns if columns <= fmt.group else math.gcd(columns, fmt.group)


@dataclass(frozen=True)
class Module:
    """How a module is stored.

    Attributes:
        dtype: of its codes.
        group: columns that share a scale; -1 for a row.
        rank: of what is added; 0 for nothing.
    """

    dtype: str
    group: int
    rank: int = 0


def module_of(info: TensorInfo, fmt: StoredFormat) -> Module:
    """Return how a weight that the layout holds is stored."""
    if isinstance(fmt, SvdDifference):
        return Module(_FLOATS[info.dtype], -1, fmt.rank)
    if isinstance(fmt, Int8):
        return Module("int8", -1)
    assert isinstance(fmt, Integer | Ternary)
    group = group_columns(info, fmt)
    signed = isinstance(fmt, Ternary) or fmt.symmetric
    return Module(f"{'int' if signed else 'uint'}{fmt.bits}", -1 if group == info.shape[1] else group)


def quantization_config(weights: Mapping[str, Weight]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a ``config.json``: the dtype of each module's codes, and plain modules."""
    modules = {name: module_of(weight.info, weight.stored_as) for name, weight in weights.items() if weight.stored_as}
    plain = [
        name
        for name, weight in weights.items()
        if weight.stored_as is None and name.endswith(".weight") and len(weight.info.shape) > 1
    ]
    dtypes: dict[str, list[str]] = {}
    for name, module in modules.items():
        dtypes.setdefault(module.dtype, []).append(name)
    groups = [module.group for module in modules.values()]
    usual = max(sorted(set(groups)), key=groups.count)
    others = {
        name: {
            **({"group_size": module.group} if module.group != usual else {}),
            **({"use_svd": True, "svd_rank": module.rank} if module.rank else {}),
        }
        for name, module in modules.items()
        if module.group != usual or module.rank
    }
    return {
        "quant_method": "sdnq",
        "weights_dtype": max(dtypes, key=lambda dtype: len(dtypes[dtype])),
        "group_size": usual,
        "modules_dtype_dict": dtypes,
        "modules_quant_config": others,
        "modules_to_not_convert": plain,
        "dequantize_fp32": True,
        "add_skip_keys": False,
        "use_svd": False,
        "use_quantized_matmul": False,
    }


def recoded(weight: Weight) -> Recoded:
    """Return a weight that the layout holds in its tensors."""
    info, fmt = weight.info, weight.stored_as
    assert fmt is not None
    stem, module, (rows, columns) = info.name.removesuffix(".weight"), module_of(info, fmt), info.shape
    grouped = (rows, columns // module.group, module.group) if module.group > 0 else (rows, columns)
    scales = (*grouped[:-1], 1)
    tensors = [_codes(info, module, grouped), TensorInfo(f"{stem}.scale", "F32", scales)]
    if isinstance(fmt, SvdDifference):
        factors = {"svd_up": (rows, fmt.rank), "svd_down": (fmt.rank, columns)}
        tensors += [TensorInfo(f"{stem}.{part}", "F32", shape) for part, shape in factors.items()]
        return Recoded(tuple(tensors), partial(_difference_values, info, fmt))
    if module.dtype.startswith("uint"):
        tensors.append(TensorInfo(f"{stem}.zero_point", "F32", scales))
    if isinstance(fmt, Int8):
        return Recoded(tuple(tensors), partial(_int8_values, info, fmt))
    assert isinstance(fmt, Integer | Ternary)
    return Recoded(tuple(tensors), partial(_grouped_values, info, fmt, grouped))


def _codes(info: TensorInfo, module: Module, grouped: tuple[int, ...]) -> TensorInfo:
    """Return the tensor of a module's codes, which lie in groups."""
    if module.rank:
        return info
    bits = int(module.dtype.removeprefix("u").removeprefix("int"))
    if bits == 8:
        return TensorInfo(info.name, "U8" if module.dtype == "uint8" else "I8", grouped)
    packing = _PACKINGS[bits]
    units = info.numel // packing.codes
    return TensorInfo(info.name, "U8", (units,) if packing.bytes == 1 else (units, packing.bytes))


def _difference_values(info: TensorInfo, fmt: SvdDifference, members: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an expert's matrix, its base with scales 1 and the factors of its difference."""
    import torch

    parts, stem = fmt.decoded(info, members), info.name.removesuffix(".weight")
    return {
        info.name: parts["base"],
        f"{stem}.scale": torch.ones(info.shape[0], 1),
        f"{stem}.svd_up": parts["left"].float(),
        f"{stem}.svd_down": parts["right"].float(),
    }


def _int8_values(info: TensorInfo, fmt: Int8, members: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an int8 weight, w = code scale / 127."""
    stored, stem = fmt.load(info, members).tensors, info.name.removesuffix(".weight")
    return {info.name: stored["packed"], f"{stem}.scale": (stored["scale"] / 127.0)[:, None]}


def _grouped_values(
    info: TensorInfo, fmt: Integer | Ternary, grouped: tuple[int, ...], members: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a weight of groups; scales of groups that are divided are repeated."""
    import torch

    stored, stem, (rows, columns) = fmt.load(info, members).tensors, info.name.removesuffix(".weight"), info.shape
    codes = _plain_codes(stored, fmt, rows, columns)
    own = torch.arange(0, columns, grouped[-1]) // fmt.group  # the group that each of the layout's lies in
    scale = stored["scale"].float()[:, own].reshape(*grouped[:-1], 1)
    values = {f"{stem}.scale": scale}
    if "zero_point" in stored:
        from ditmoe_cli.formats.packing import unpack_columns

        zero = unpack_columns(stored["zero_point"], rows, fmt.bits)
        values[f"{stem}.zero_point"] = zero[:, own].reshape(scale.shape) * -scale
    if fmt.bits == 8:
        signed = "zero_point" not in stored
        return {**values, info.name: ((codes ^ 128).view(torch.int8) if signed else codes).view(grouped)}
    return {**values, info.name: packed_codes(codes, fmt.bits)}


def _plain_codes(stored: Mapping[str, Tensor], fmt: Integer | Ternary, rows: int, columns: int) -> Tensor:
    """Return the codes (rows, columns) of a weight, less the least that its width has, as uint8."""
    import torch

    from ditmoe_cli.formats.packing import base3_digits, unpack_rows

    if isinstance(fmt, Ternary):
        return (base3_digits(stored["packed"], torch.int8)[: rows * columns] + 2).view(torch.uint8).view(rows, columns)
    return unpack_rows(stored["packed"], columns, fmt.bits).clone(memory_format=torch.contiguous_format)


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Return uint8 codes of 2 to 6 bits, a multiple of eight of them, packed into bytes (units,) or (units, bytes)."""
    import torch

    packing = _PACKINGS[bits]
    units = codes.reshape(-1, packing.codes)
    packed = torch.zeros(len(units), packing.bytes, dtype=torch.uint8, device=codes.device)
    for move in packing.moves:
        drawn = units[:, move.code].bitwise_right_shift(move.bit).bitwise_and_((1 << move.number) - 1)
        packed[:, move.byte] |= drawn.bitwise_left_shift_(move.place)
    return packed.view(-1) if packing.bytes == 1 else packed
