"""How packed weights are laid out on disk: names, dtypes, shapes and sizes, known without torch.

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

A block's experts may be stored as one base and what each differs from it by. A matrix X.weight (out, in) of an expert,
X = blocks.i.moe.experts.e.gate_proj, up_proj or down_proj, then has no tensor of its own name. It is the base of its
block, in the dtype that the matrix has to the model, plus a product of factors in that dtype, or a scale times codes:

    base       blocks.i.moe.base.gate_proj.weight      ...  (out, in)       likewise of up_proj and down_proj
    svd        X.weight.delta_left                     ...  (out, r)
               X.weight.delta_right                    ...  (r, in)
    ternary    X.weight.delta_ternary                  U8   (ceil(out*in/5),)   codes -1, 0, 1, five a byte in base 3
               X.weight.delta_scale                    F32  ()
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ditmoe_cli.checkpoint.header import FLOATING, TensorInfo
from ditmoe_cli.checkpoint.names import BASE, MATRICES, in_block, split_name
from ditmoe_cli.errors import BadInputError

Format = Literal["nf4", "int8"]
DeltaFormat = Literal["svd", "ternary"]
NF4_BLOCK = 64
TERNARY_PER_BYTE = 5  # 3⁵ = 243 fits a byte
_DELTA_PARTS: Mapping[str, DeltaFormat] = {
    "delta_left": "svd",
    "delta_right": "svd",
    "delta_ternary": "ternary",
    "delta_scale": "ternary",
}
_STATE_SUFFIX = ".quant_state.bitsandbytes__"
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODES = {name: code for code, name in _TORCH_NAMES.items()}


@dataclass(frozen=True)
class Weight:
    """A tensor as the model sees it: its logical dtype and shape, its format, and what stores it.

    `format` is None for a plain tensor, whose only member is itself. The base of ``svd`` and ``ternary`` weights is the
    first member of each expert's, and no weight itself.
    """

    info: TensorInfo
    format: Format | DeltaFormat | None
    members: tuple[str, ...]

    @property
    def quantized(self) -> bool:
        """Whether the weight is kept packed in memory too."""
        return self.format in get_args(Format)


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


def ternary_bytes(values: int) -> int:
    """Return how many bytes ternary values take, ⌈values / 5⌉."""
    return math.ceil(values / TERNARY_PER_BYTE)


def base_name(name: str) -> str:
    """Return the name of the base that the matrix `name` of an expert is stored as a difference from.

    Raises `BadInputError` for what is no matrix of an expert.
    """
    parts = split_name(name)
    if parts.block is None or parts.expert is None or parts.rest not in {f"{matrix}.weight" for matrix in MATRICES}:
        raise BadInputError(f"{name!r} is stored as a difference, but only matrices of routed experts may be")
    return in_block(parts.block, f"{BASE}.{parts.rest}")


def difference_members(info: TensorInfo, fmt: DeltaFormat, rank: int) -> list[TensorInfo]:
    """Return the tensors that store what an expert's matrix `info` differs from its base by; `rank` is for ``svd``."""
    rows, columns = info.shape
    if fmt == "svd":
        return [
            TensorInfo(f"{info.name}.delta_left", info.dtype, (rows, rank)),
            TensorInfo(f"{info.name}.delta_right", info.dtype, (rank, columns)),
        ]
    return [
        TensorInfo(f"{info.name}.delta_ternary", "U8", (ternary_bytes(info.numel),)),
        TensorInfo(f"{info.name}.delta_scale", "F32", ()),
    ]


def logical_weights(tensors: Mapping[str, TensorInfo], raw: Callable[[str], bytes]) -> dict[str, Weight]:
    """Group stored tensors into the weights the model sees.

    `raw(name)` returns a stored tensor's bytes; only the small JSON descriptions are read.
    """
    result: dict[str, Weight] = {}
    taken: set[str] = set()
    for name in tensors:
        stem, _, part = name.rpartition(".")
        if _STATE_SUFFIX in name:
            weight = _nf4_weight(name, tensors, raw(name))
        elif name.endswith(".SCB"):
            weight = _int8_weight(name, tensors)
        elif stem and part in _DELTA_PARTS:
            weight = _delta_weight(stem, _DELTA_PARTS[part], tensors)
        else:
            continue
        if result.setdefault(weight.info.name, weight) != weight:
            raise BadInputError(f"the weight {weight.info.name!r} is stored twice, in different formats")
        taken.update(weight.members)
    result.update({n: Weight(info, None, (n,)) for n, info in tensors.items() if n not in taken})
    return result


def _quantized_weight(info: TensorInfo, fmt: Format, tensors: Mapping[str, TensorInfo]) -> Weight:
    if len(info.shape) != 2:
        raise BadInputError(f"the {fmt} weight {info.name!r} has shape {list(info.shape)}, which is no matrix")
    return _of_members(info, fmt, quantized_members(info, fmt), tensors)


def _of_members(
    info: TensorInfo, fmt: Format | DeltaFormat, members: Sequence[TensorInfo], tensors: Mapping[str, TensorInfo]
) -> Weight:
    """Return the weight that is stored as `members`, each of which has to be there as it is described."""
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
    return _quantized_weight(TensorInfo(name, dtype, shape), "nf4", tensors)


def _int8_weight(scale_name: str, tensors: Mapping[str, TensorInfo]) -> Weight:
    name = scale_name.removesuffix("SCB") + "weight"
    if name not in tensors:
        raise BadInputError(f"tensor {scale_name!r} stands without its weight {name!r}")
    return _quantized_weight(TensorInfo(name, "F16", tensors[name].shape), "int8", tensors)


def _delta_weight(name: str, fmt: DeltaFormat, tensors: Mapping[str, TensorInfo]) -> Weight:
    base = tensors.get(base_name(name))
    if base is None:
        raise BadInputError(f"the {fmt} weight {name!r} stands without its base {base_name(name)!r}")
    if name in tensors:
        raise BadInputError(f"tensor {name!r} stands beside its difference from {base.name!r}; one of them is too many")
    if len(base.shape) != 2 or base.dtype not in FLOATING:
        raise BadInputError(
            f"tensor {base.name!r} is {base.dtype} {list(base.shape)}, but the base of {name!r} has to be a floating "
            "matrix"
        )
    info = replace(base, name=name)
    return _of_members(info, fmt, [base, *difference_members(info, fmt, _rank(name, tensors))], tensors)


def _rank(name: str, tensors: Mapping[str, TensorInfo]) -> int:
    """Return the rank that a difference's factors tell: the columns of the left one, else the rows of the right one."""
    sides = ((f"{name}.delta_left", -1), (f"{name}.delta_right", 0))
    return next((tensors[side].shape[axis] for side, axis in sides if side in tensors and tensors[side].shape), 0)


def is_quantizable(info: TensorInfo) -> bool:
    """Tell whether a weight can be stored in a quantised format: a floating matrix of even size."""
    return len(info.shape) == 2 and info.dtype in FLOATING - {"F64"} and info.numel % 2 == 0
