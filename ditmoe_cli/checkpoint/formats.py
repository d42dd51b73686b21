"""How quantised weights are laid out on disk: names, dtypes, shapes and sizes, known without torch.

NF4 (4 bits, blocks of 64 weights) and int8 (one scale a row) are stored exactly as bitsandbytes 0.50
serialises them, so that its own readers take our files.

A weight ``X.weight`` of shape (out, in) becomes

    nf4    X.weight                                     U8   (out*in/2, 1)   first of each pair in the high nibble
           X.weight.absmax                              F32  (ceil(out*in/64),)
           X.weight.quant_map                           F32  (16,)
           X.weight.quant_state.bitsandbytes__nf4       U8   JSON: quant_type, blocksize, dtype, shape
    int8   X.weight                                     I8   (out, in)
           X.SCB                                        F32  (out,)
           X.weight_format                              U8   ()              always 0
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from ditmoe_cli.checkpoint.header import FLOATING, TensorInfo
from ditmoe_cli.errors import BadInputError

Format = Literal["nf4", "int8"]
NF4_BLOCK = 64
_STATE_SUFFIX = ".quant_state.bitsandbytes__"
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODES = {name: code for code, name in _TORCH_NAMES.items()}


@dataclass(frozen=True)
class Weight:
    """A tensor as the model sees it: its logical dtype and shape, its format, and what stores it.

    `format` is None for a plain tensor, whose only member is itself.
    """

    info: TensorInfo
    format: Format | None
    members: tuple[str, ...]


def quant_state_json(info: TensorInfo) -> bytes:
    """Return bitsandbytes' JSON description of an NF4 weight, byte for byte as it writes it."""
    state = {
        "quant_type": "nf4",
        "blocksize": NF4_BLOCK,
        "dtype": _TORCH_NAMES[info.dtype],
        "shape": list(info.shape),
    }
    return json.dumps(state).encode()


def quantized_members(info: TensorInfo, fmt: Format) -> list[TensorInfo]:
    """Return the tensors that store the weight `info` in format `fmt`."""
    if fmt == "nf4":
        return [
            TensorInfo(info.name, "U8", (math.ceil(info.numel / 2), 1)),
            TensorInfo(f"{info.name}.absmax", "F32", (math.ceil(info.numel / NF4_BLOCK),)),
            TensorInfo(f"{info.name}.quant_map", "F32", (16,)),
            TensorInfo(f"{info.name}{_STATE_SUFFIX}nf4", "U8", (len(quant_state_json(info)),)),
        ]
    stem = info.name.removesuffix(".weight")
    return [
        TensorInfo(info.name, "I8", info.shape),
        TensorInfo(f"{stem}.SCB", "F32", (info.shape[0],)),
        TensorInfo(f"{stem}.weight_format", "U8", ()),
    ]


def logical_weights(tensors: Mapping[str, TensorInfo], raw: Callable[[str], bytes]) -> dict[str, Weight]:
    """Group stored tensors into the weights the model sees.

    `raw(name)` returns a stored tensor's bytes; only the small JSON descriptions are read.
    """
    result: dict[str, Weight] = {}
    taken: set[str] = set()
    for name in tensors:
        if _STATE_SUFFIX in name:
            weight = _nf4_weight(name, tensors, raw(name))
        elif name.endswith(".SCB"):
            weight = _int8_weight(name, tensors)
        else:
            continue
        result[weight.info.name] = weight
        taken.update(weight.members)
    result.update({n: Weight(info, None, (n,)) for n, info in tensors.items() if n not in taken})
    return result


def _require_members(info: TensorInfo, fmt: Format, tensors: Mapping[str, TensorInfo]) -> Weight:
    if len(info.shape) != 2:
        raise BadInputError(f"the {fmt} weight {info.name!r} has shape {list(info.shape)}, which is no matrix")
    members = quantized_members(info, fmt)
    for member in members:
        found = tensors.get(member.name)
        if found != member:
            what = f"{found.dtype} {list(found.shape)}" if found else "missing"
            raise BadInputError(
                f"tensor {member.name!r} of the {fmt} weight {info.name!r} is {what}, "
                f"expected {member.dtype} {list(member.shape)}"
            )
    return Weight(info, fmt, tuple(member.name for member in members))


def _nf4_weight(state_name: str, tensors: Mapping[str, TensorInfo], state: bytes) -> Weight:
    name, _, kind = state_name.partition(_STATE_SUFFIX)
    try:
        described = json.loads(state)
        dtype, shape = _CODES[described["dtype"]], tuple(int(n) for n in described["shape"])
        block = described["blocksize"]
    except (ValueError, KeyError, TypeError):
        raise BadInputError(f"tensor {state_name!r} does not hold a bitsandbytes quantisation state") from None
    if kind != "nf4" or block != NF4_BLOCK or "nested_blocksize" in described:
        raise BadInputError(
            f"tensor {name!r} is {kind} with blocks of {block}; ditmoe reads nf4 with blocks of {NF4_BLOCK} "
            "and no double quantisation"
        )
    return _require_members(TensorInfo(name, dtype, shape), "nf4", tensors)


def _int8_weight(scale_name: str, tensors: Mapping[str, TensorInfo]) -> Weight:
    name = scale_name.removesuffix("SCB") + "weight"
    if name not in tensors:
        raise BadInputError(f"tensor {scale_name!r} stands without its weight {name!r}")
    return _require_members(TensorInfo(name, "F16", tensors[name].shape), "int8", tensors)


def is_quantizable(info: TensorInfo) -> bool:
    """Tell whether a weight can be stored in a quantised format: a floating matrix of even size."""
    return len(info.shape) == 2 and info.dtype in FLOATING - {"F64"} and info.numel % 2 == 0
