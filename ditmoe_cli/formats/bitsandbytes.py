"""The formats of bitsandbytes: NF4 and FP4, with and without double quantisation, and int8.

They are stored exactly as bitsandbytes 0.50 serialises them, so that its own readers take our files. A weight
``X.weight`` of shape (out, in) becomes, with B = ceil(out*in/64) and f4 for nf4 or fp4:

    f4     X.weight                                     U8   (out*in/2, 1)   first of each pair in the high nibble
           X.weight.absmax                              F32  (B,)
           X.weight.quant_map                           F32  (16,)           w = quant_map[code] * absmax
           X.weight.quant_state.bitsandbytes__f4        U8   JSON: quant_type, blocksize, dtype, shape
    f4-dq  X.weight, X.weight.quant_map                      as above
           X.weight.absmax                              U8   (B,)
           X.weight.nested_absmax                       F32  (ceil(B/256),)
           X.weight.nested_quant_map                    F32  (256,)
           X.weight.quant_state.bitsandbytes__f4        U8   JSON, with nested_blocksize, nested_dtype, nested_offset
                                                             absmax = nested_quant_map[code] * nested_absmax + offset
    int8   X.weight                                     I8   (out, in)
           X.SCB                                        F32  (out,)          w = code * SCB / 127
           X.weight_format                              U8   ()              always 0

Four-bit blocks are 64 weights of the flattened matrix. The JSON of -dq is padded with spaces, so that its size does not
depend on how many digits nested_offset takes. Other block sizes, as bitsandbytes may write them, are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import FLOATING, TensorInfo
from ditmoe_cli.files.json_text import parse_json
from ditmoe_cli.formats.base import (
    Composition,
    Grid,
    NumberFormat,
    PackedWeight,
    RawBytes,
    Weight,
    require_matrix,
    stored_weight,
)

if TYPE_CHECKING:
    from torch import Tensor

FourBitKind = Literal["nf4", "fp4"]
BLOCK = 64  # weights that share an absmax
NESTED_BLOCK = 256  # absmax that share a scale under double quantisation
_BLOCKS_READ = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # block sizes that bitsandbytes knows
_OFFSET_DIGITS = 24  # no fp32 value takes more characters in JSON
_LONGEST_STATE = 4096  # bytes; bitsandbytes' own have some 150
_MOST_ELEMENTS = 2**40  # of a matrix, so that sizes stay exact in arithmetic
_STATE_SUFFIX = ".quant_state.bitsandbytes__"
_STATED = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")  # ends of the names that a state describes
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TORCH_NAMES = {**{code: name for name, code in _CODES.items()}, "F64": "float32"}  # fp64 is stored as fp32 would be


def fits_bitsandbytes(info: TensorInfo) -> bool:
    """Return whether a weight can be stored in bitsandbytes' formats: a floating matrix of even size."""
    return len(info.shape) == 2 and info.dtype in FLOATING and info.numel % 2 == 0


@dataclass(frozen=True)
class FourBit(NumberFormat):
    """NF4 or FP4: w = a q_c with a the largest |w| of a block (QLoRA, https://arxiv.org/abs/2305.14314).

    With `double` quantisation the blocks' a are stored in 8 bits, and w is rounded to what is then stored of a.
    """

    kind: FourBitKind
    double: bool = False
    bits = 4

    @property
    def name(self) -> str:
        """The format's name in plans and messages."""
        return f"{self.kind}-dq" if self.double else self.kind

    def accepts(self, info: TensorInfo) -> bool:
        """Return whether the dtype and shape of a weight allow the format."""
        return fits_bitsandbytes(info)

    def members(self, info: TensorInfo) -> dict[str, TensorInfo]:
        """Return the tensors that store the weight `info`, by the part that each plays."""
        return self._members(info, len(self.state_json(info)), BLOCK, NESTED_BLOCK)

    def _members(self, info: TensorInfo, state_bytes: int, block: int, nested_block: int) -> dict[str, TensorInfo]:
        blocks = math.ceil(info.numel / block)
        members = {
            "packed": TensorInfo(info.name, "U8", (math.ceil(info.numel / 2), 1)),
            "absmax": TensorInfo(f"{info.name}.absmax", "U8" if self.double else "F32", (blocks,)),
            "quant_map": TensorInfo(f"{info.name}.quant_map", "F32", (16,)),
        }
        if self.double:
            scales = (math.ceil(blocks / nested_block),)
            members["nested_absmax"] = TensorInfo(f"{info.name}.nested_absmax", "F32", scales)
            members["nested_quant_map"] = TensorInfo(f"{info.name}.nested_quant_map", "F32", (256,))
        return members | {"state": TensorInfo(self._state_name(info), "U8", (state_bytes,))}

    def _state_name(self, info: TensorInfo) -> str:
        return f"{info.name}{_STATE_SUFFIX}{self.kind}"

    def state_json(self, info: TensorInfo, offset: float = 0.0) -> bytes:
        """Return bitsandbytes' JSON description of a weight, as it writes it.

        With double quantisation, `offset` is subtracted from the blocks' absmax, and spaces follow up to the length
        that the longest offset would give. JSON allows them.
        """
        state: dict[str, object] = {
            "quant_type": self.kind,
            "blocksize": BLOCK,
            "dtype": _TORCH_NAMES[info.dtype],
            "shape": list(info.shape),
        }
        if not self.double:
            return json.dumps(state).encode()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        longest = len(json.dumps(state | {"nested_offset": 0})) - 1 + _OFFSET_DIGITS
        return json.dumps(state | {"nested_offset": offset}).ljust(longest).encode()

    @classmethod
    def find(cls, name: str, tensors: Mapping[str, TensorInfo], raw: RawBytes) -> Weight | None:
        """Return the weight that the stored tensor `name` describes; None where it describes none."""
        stem, suffix, kind = name.partition(_STATE_SUFFIX)
        if not suffix:
            _refuse_stateless(name, tensors)
            return None
        if kind not in ("nf4", "fp4"):
            raise BadInputError(f"tensor {name!r}: {kind} is no format that ditmoe reads; it reads nf4 and fp4")
        if tensors[name].nbytes > _LONGEST_STATE:
            raise BadInputError(f"tensor {name!r} does not hold a bitsandbytes quantisation state")
        text = raw(name)
        state = parse_quant_state(text, name)
        fmt = cls("nf4" if kind == "nf4" else "fp4", double=bool(state.nested_block))
        info = TensorInfo(stem, state.dtype, state.shape)
        require_matrix(info, fmt)
        # The length of the JSON is the stored one: other programs may lay it out otherwise.
        members = fmt._members(info, len(text), state.block, state.nested_block)
        return stored_weight(info, fmt, members.values(), tensors)

    def grid(self, weight: Tensor, importance: Tensor | None = None, *, name: str = "weight") -> Grid:  # noqa: ARG002
        """Return the grid on which to round a weight (out, in); all columns are of the same importance.

        Raises `BadInputError` that names the tensor `name` for values that the format does not hold.
        """
        from ditmoe_cli.formats.bitsandbytes_arithmetic import four_bit_grid

        nested_block = NESTED_BLOCK if self.double else 0
        return four_bit_grid(
            self, self.kind, weight.detach(), self.state_json, name=name, block=BLOCK, nested_block=nested_block
        )

    def check_values(self, weight: Tensor, name: str) -> None:
        """Raise `BadInputError` for values beyond fp32, and for absmax that fp32, or eight bits, do not hold."""
        self.grid(weight, name=name)

    def load(self, info: TensorInfo, members: Mapping[str, Tensor]) -> PackedWeight:
        """Return what stays of a weight in memory: codes, absmax, and the pairs of values that bytes stand for."""
        from ditmoe_cli.formats.bitsandbytes_arithmetic import code_pairs, is_usual, unpack_four_bit_weight

        state = self._state(info, members)
        kept = ("absmax", "nested_absmax", "nested_quant_map") if self.double else ("absmax",)
        codes = members[f"{info.name}.quant_map"]
        tensors = {
            "packed": members[info.name],
            **{part: members[f"{info.name}.{part}"] for part in kept},
            "pairs": code_pairs(codes),
        }
        unpack = partial(
            unpack_four_bit_weight,
            kind=self.kind,
            usual=is_usual(codes, self.kind),
            block=state.block,
            nested_block=state.nested_block,
            offset=state.offset,
        )
        return PackedWeight(tensors, info.shape, unpack)

    def _state(self, info: TensorInfo, members: Mapping[str, Tensor]) -> FourBitState:
        name = self._state_name(info)
        return parse_quant_state(bytes(members[name].tolist()), name)

    def trained_parts(self, info: TensorInfo, codes: bool = False) -> dict[str, int]:  # noqa: ARG002
        """Return the part that training changes, and how many values it has: absmax, or what scales those of -dq.

        They are as many as in blocks of the usual sizes.
        """
        blocks = math.ceil(info.numel / BLOCK)
        return {"nested_absmax": math.ceil(blocks / NESTED_BLOCK)} if self.double else {"absmax": blocks}

    def composition(self, info: TensorInfo, members: Mapping[str, Tensor]) -> Composition:
        """Return how the matrix of the weight `info` is made of absmax, or of what scales those of -dq."""
        from ditmoe_cli.formats.bitsandbytes_arithmetic import composed_four_bit

        state = self._state(info, members)
        tensors = self.load(info, members).tensors
        return partial(
            composed_four_bit,
            tensors,
            shape=info.shape,
            block=state.block,
            nested_block=state.nested_block,
            offset=state.offset,
        )


def _refuse_stateless(name: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise `BadInputError` where the stored tensor `name` is a part of a four-bit weight without its state."""
    stem, _, part = name.rpartition(".")
    states = [f"{stem}{_STATE_SUFFIX}{kind}" for kind in ("nf4", "fp4")]
    if part not in _STATED or any(state in tensors for state in states):
        return
    if not any(other.startswith(f"{stem}{_STATE_SUFFIX}") for other in tensors):  # of another kind, refused as such
        raise BadInputError(
            f"tensor {name!r} of the packed weight {stem!r} stands without its state: "
            f"{' or '.join(map(repr, states))} is missing"
        )


@dataclass(frozen=True)
class FourBitState:
    """The fields of bitsandbytes' JSON of a four-bit weight; `nested_block` is 0 without double quantisation."""

    dtype: str
    shape: tuple[int, ...]
    block: int
    nested_block: int
    offset: float


def parse_quant_state(state: bytes, name: str) -> FourBitState:
    """Read bitsandbytes' JSON. Raises `BadInputError` that names the tensor `name`."""
    try:
        described = parse_json(state)
        nested = "nested_blocksize" in described
        parsed = FourBitState(
            _CODES[described["dtype"]],
            tuple(map(_whole, described["shape"])),
            _whole(described["blocksize"]),
            _whole(described["nested_blocksize"]) if nested else 0,
            float(described["nested_offset"]) if nested else 0.0,
        )
        good = all(n >= 0 for n in parsed.shape) and math.isfinite(parsed.offset) and parsed.nested_block >= 0
        good &= not nested or (parsed.nested_block > 0 and described["nested_dtype"] == "float32")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        good = False
    if not good:
        raise BadInputError(f"tensor {name!r} does not hold a bitsandbytes quantisation state")
    unknown = {parsed.block, parsed.nested_block or BLOCK}.difference(_BLOCKS_READ)
    if unknown:
        raise BadInputError(f"tensor {name!r} tells of blocks of {min(unknown)}, which bitsandbytes does not know")
    return parsed


def _whole(value: object) -> int:
    """Return a number of elements. Raises `ValueError` for what is none."""
    if type(value) is not int or not 0 <= value < _MOST_ELEMENTS:
        raise ValueError(f"{value!r} is no number of elements")
    return value


@dataclass(frozen=True)
class Int8(NumberFormat):
    """w = c s / 127 with s the largest |w| of a row in fp16 (LLM.int8, https://arxiv.org/abs/2208.07339)."""

    name = "int8"
    bits = 8

    def accepts(self, info: TensorInfo) -> bool:
        """Return whether the dtype and shape of a weight allow the format."""
        return fits_bitsandbytes(info)

    def members(self, info: TensorInfo) -> dict[str, TensorInfo]:
        """Return the tensors that store the weight `info`, by the part that each plays."""
        stem = info.name.removesuffix(".weight")
        return {
            "packed": TensorInfo(info.name, "I8", info.shape),
            "scale": TensorInfo(f"{stem}.SCB", "F32", (info.shape[0],)),
            "form": TensorInfo(f"{stem}.weight_format", "U8", ()),
        }

    @classmethod
    def find(cls, name: str, tensors: Mapping[str, TensorInfo], raw: RawBytes) -> Weight | None:  # noqa: ARG003
        """Return the weight whose scales the stored tensor `name` holds; None where it holds none."""
        stem = name.removesuffix(".weight_format")
        if stem != name and f"{stem}.SCB" not in tensors:
            raise BadInputError(
                f"tensor {name!r} of the int8 weight '{stem}.weight' stands without its scales: '{stem}.SCB' is missing"
            )
        if not name.endswith(".SCB"):
            return None
        weight = name.removesuffix("SCB") + "weight"
        if weight not in tensors:
            raise BadInputError(f"tensor {name!r} stands without its weight {weight!r}")
        info, fmt = TensorInfo(weight, "F16", tensors[weight].shape), cls()
        require_matrix(info, fmt)
        return stored_weight(info, fmt, fmt.members(info).values(), tensors)

    def grid(self, weight: Tensor, importance: Tensor | None = None, *, name: str = "weight") -> Grid:  # noqa: ARG002
        """Return the grid on which to round a weight (out, in); all columns are of the same importance.

        Raises `BadInputError` that names the tensor `name` for values that the format does not hold.
        """
        from ditmoe_cli.formats.bitsandbytes_arithmetic import int8_grid

        return int8_grid(self, weight.detach(), name)

    def check_values(self, weight: Tensor, name: str) -> None:
        """Raise `BadInputError` for values that fp16 does not hold, to which bitsandbytes rounds them first."""
        self.grid(weight, name=name)

    def load(self, info: TensorInfo, members: Mapping[str, Tensor]) -> PackedWeight:
        """Return what stays of a weight in memory: codes and scales."""
        from ditmoe_cli.formats.bitsandbytes_arithmetic import unpack_int8

        kept = ("packed", "scale")
        names = self.members(info)
        return PackedWeight({part: members[names[part].name] for part in kept}, info.shape, unpack_int8)

    def trained_parts(self, info: TensorInfo, codes: bool = False) -> dict[str, int]:  # noqa: ARG002
        """Return the part that training changes, and how many values it has: the scales of rows."""
        return {"scale": info.shape[0]}

    def composition(self, info: TensorInfo, members: Mapping[str, Tensor]) -> Composition:
        """Return how the matrix of the weight `info` is made of the scales of rows."""
        from ditmoe_cli.formats.bitsandbytes_arithmetic import composed_int8

        return partial(composed_int8, self.load(info, members).tensors["packed"])
