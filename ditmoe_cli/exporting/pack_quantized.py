"""compressed-tensors' layout ``pack-quantized``: integer weights of 1 to 8 bits, densely packed in 32-bit words.

A folder holds safetensors and a ``config.json`` whose ``quantization_config`` names the format, and for each group of
modules that are quantised alike their bits, groups and symmetry. A weight ``X.weight`` (out, in) of b bits, in G groups
of columns, becomes:

           X.weight_packed                              I32  (out, ceil(in*b/32))
           X.weight_scale                               F16  (out, G)        w = (code - zero) * scale; F32 of int8
           X.weight_zero_point                          I32  (ceil(out*b/32), G)    absent of symmetric ones
           X.weight_shape                               I64  (2,)            out, in

Codes, zero points and scales of integer formats are those that ditmoe stores, to the bit; the library computes in the
dtype of the scales. int8 of bitsandbytes is symmetric, with a scale for each row. Rows are whole groups, or one group
(https://github.com/vllm-project/compressed-tensors, `PackedQuantizationCompressor`, 0.18 and later).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.exporting.recoded import QuantizedLayout, Recoded
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.base import StoredFormat, Weight
from ditmoe_cli.formats.bitsandbytes import Int8
from ditmoe_cli.formats.integer import Integer
from ditmoe_cli.formats.packed_sizes import packed_words

if TYPE_CHECKING:
    from torch import Tensor

_CODE_BITS = 8  # of int8
_INFINITE_HALF = 65520.0  # the least that fp16 rounds to infinity


def shortfall(info: TensorInfo, fmt: StoredFormat) -> str | None:
    """Return why the layout does not hold the weight `info` in a format; None where it does."""
    if isinstance(fmt, Int8):
        return None
    if not isinstance(fmt, Integer):
        return f"is {fmt.name}, and the layout holds integers of one width a matrix"
    columns = info.shape[1]
    if columns > fmt.group and columns % fmt.group:
        return f"has rows of {columns}, and the layout holds whole groups, here of {fmt.group}"
    return None


@dataclass(frozen=True)
class Scheme:
    """How modules are quantised: bits, whether symmetric, and columns of a group; None for one scale a row."""

    bits: int
    symmetric: bool
    group: int | None

    def to_json(self) -> dict[str, Any]:
        """Return the library's ``QuantizationArgs``."""
        grouping = {"strategy": "channel" if self.group is None else "group", "group_size": self.group}
        return {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False, **grouping}


def scheme(info: TensorInfo, fmt: StoredFormat) -> Scheme:
    """Return how a weight that the layout holds is quantised."""
    if isinstance(fmt, Int8):
        return Scheme(_CODE_BITS, True, None)
    assert isinstance(fmt, Integer)
    return Scheme(fmt.bits, fmt.symmetric, fmt.group if info.shape[1] >= fmt.group else None)


def quantization_config(weights: Mapping[str, Weight]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a ``config.json``: modules by how they are quantised, and plain ones."""
    groups: dict[Scheme, list[str]] = {}
    plain = []
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if weight.stored_as is not None:
            groups.setdefault(scheme(weight.info, weight.stored_as), []).append(module)
        elif module != name and len(weight.info.shape) == 2:
            plain.append(module)
    listed = {
        f"group_{number}": {"targets": modules, "weights": how.to_json(), "format": "pack-quantized"}
        for number, (how, modules) in enumerate(groups.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": listed,
        "ignore": plain,
    }


def recoded(weight: Weight) -> Recoded:
    """Return a weight that the layout holds in its tensors."""
    info, fmt = weight.info, weight.stored_as
    shape = TensorInfo(f"{info.name}_shape", "I64", (2,))
    if isinstance(fmt, Int8):
        packed = TensorInfo(f"{info.name}_packed", "I32", (info.shape[0], packed_words(info.shape[1], _CODE_BITS)))
        scale = TensorInfo(f"{info.name}_scale", "F32", (info.shape[0], 1))
        return Recoded((packed, scale, shape), partial(_int8_values, info, fmt))
    assert isinstance(fmt, Integer)
    return Recoded(tuple({**fmt.members(info), "shape": shape}.values()), partial(_integer_values, info, fmt))


def _integer_values(info: TensorInfo, fmt: Integer, members: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the stored tensors of an integer weight, and its shape as the library has it.

    Raises `BadInputError` for values that are infinite in fp16, in which the library computes.
    """
    scale = members[fmt.members(info)["scale"].name]
    if float(scale.abs().max()) * (2**fmt.bits - 1) >= _INFINITE_HALF:
        largest = float(fmt.dequantize(info, members).abs().max())
        if largest >= _INFINITE_HALF:
            raise BadInputError(f"tensor {info.name!r} holds {largest:g}, beyond fp16, in which the library computes")
    return {**members, **_shape(info)}


def _shape(info: TensorInfo) -> dict[str, Tensor]:
    import torch

    return {f"{info.name}_shape": torch.tensor(info.shape)}


def _int8_values(info: TensorInfo, fmt: Int8, members: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an int8 weight, w = (code - 128) scale / 127."""
    import torch

    from ditmoe_cli.formats.packing import pack_rows

    stored = fmt.load(info, members).tensors
    codes = (stored["packed"].to(torch.int16) + 2 ** (_CODE_BITS - 1)).to(torch.uint8)
    packed, scale = pack_rows(codes, _CODE_BITS), (stored["scale"] / 127.0)[:, None]
    return {f"{info.name}_packed": packed, f"{info.name}_scale": scale, **_shape(info)}


LAYOUT = QuantizedLayout(
    "compressed-tensors", "ModelCompressor of compressed_tensors, by the config.json", recoded, quantization_config
)
