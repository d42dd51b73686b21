"""Formats whose fp16 scales belong to groups of columns: the layout that `integer` and `ternary` share.

A weight ``X.weight`` of shape (out, in) is stored in groups of g columns, G = ceil(in/g) a row, the last of which may
be shorter:

           X.weight_packed                              codes, as each format packs them
           X.weight_scale                               F16  (out, G)
           X.weight_shape                               I32  (2,)            out, in

Nothing else says how it is stored. g follows from the columns of the scales: it is the smallest that fits, and where
several fit, a row is one group, and they are the same. Rows have at least 8 columns: in shorter ones scales would take
what codes save.
"""

from __future__ import annotations

import math
import struct
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import FLOATING, TensorInfo
from ditmoe_cli.formats.base import NumberFormat, RawBytes

GROUPS = (32, 64, 128)
FEWEST_COLUMNS = 8
_PARTS = frozenset({"weight_packed", "weight_scale", "weight_zero_point", "weight_shape"})


@dataclass(frozen=True)
class GroupedFormat(NumberFormat):
    """A format with an fp16 scale for each `group` of columns. Its pieces may make up a matrix."""

    group: int
    cuttable = True

    def accepts(self, info: TensorInfo) -> bool:
        """Return whether the weight is a floating matrix of at least 8 columns."""
        return len(info.shape) == 2 and info.dtype in FLOATING and info.shape[1] >= FEWEST_COLUMNS

    def groups(self, columns: int) -> int:
        """Return how many scales a row has."""
        return math.ceil(columns / self.group)

    def members(self, info: TensorInfo) -> dict[str, TensorInfo]:
        """Return the tensors that store the weight `info`, by the part that each plays."""
        return {
            "packed": self.packed_member(info),
            "scale": TensorInfo(f"{info.name}_scale", "F16", (info.shape[0], self.groups(info.shape[1]))),
            "shape": TensorInfo(f"{info.name}_shape", "I32", (2,)),
        }

    @abstractmethod
    def packed_member(self, info: TensorInfo) -> TensorInfo:
        """Return the tensor that stores the codes of the weight `info`."""


def grouped_weight_name(member: str) -> str | None:
    """Return the name of the weight that the stored tensor `member` is a part of; None where it is of none."""
    stem, _, part = member.rpartition(".")
    return f"{stem}.weight" if stem and part in _PARTS else None


def packed_as_bytes(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Return whether the codes of the weight `name` are packed in bytes, as ternary ones are, not in words."""
    packed = tensors.get(f"{name}_packed")
    return packed is not None and packed.dtype == "U8"


def read_shape_and_group(name: str, tensors: Mapping[str, TensorInfo], raw: RawBytes) -> tuple[TensorInfo, int]:
    """Return the weight `name` and the size of its groups. Raises `BadInputError` that names the tensor at fault."""
    _, scale, shape = (_required(name, part, tensors) for part in ("packed", "scale", "shape"))
    if shape.dtype != "I32" or shape.shape not in ((2,), (3,)):
        raise BadInputError(f"tensor {shape.name!r} is {shape.dtype} {list(shape.shape)}, expected I32 [2] or [3]")
    rows, columns = struct.unpack("<2i", raw(shape.name)[:8])
    if rows < 1 or columns < FEWEST_COLUMNS:
        raise BadInputError(
            f"tensor {shape.name!r} says [{rows}, {columns}]; expected at least 1 row and {FEWEST_COLUMNS} columns"
        )
    group = next((g for g in GROUPS if scale.shape == (rows, math.ceil(columns / g))), None)
    if group is None:
        raise BadInputError(
            f"tensor {scale.name!r} has shape {list(scale.shape)}, which no groups of "
            f"{', '.join(map(str, GROUPS))} columns give for a weight of {[rows, columns]}"
        )
    return TensorInfo(name, "F16", (rows, columns)), group


def _required(name: str, part: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    if f"{name}_{part}" not in tensors:
        raise BadInputError(f"tensor '{name}_{part}' of the packed weight {name!r} is missing")
    return tensors[f"{name}_{part}"]
