"""Ternary formats: ternary-g{g}, with groups of g columns, 32, 64 or 128.

A weight ``X.weight`` of shape (out, in) becomes, with G = ceil(in/g) groups a row:

           X.weight_packed                              U8   (ceil(out*in/5),)      codes -1, 0, 1
           X.weight_scale                               F16  (out, G)        w = code * scale
           X.weight_shape                               I32  (2,)            out, in

Codes run over the flattened matrix, byte = sum_i (code_i + 1) 3^i over five at a time; the last byte is padded with
codes 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.base import Composition, Grid, PackedWeight, RawBytes, Weight, stored_weight
from ditmoe_cli.formats.grouped import GroupedFormat, grouped_weight_name, packed_as_bytes, read_shape_and_group
from ditmoe_cli.formats.packed_sizes import ternary_bytes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ternary(GroupedFormat):
    """w = c s with codes c in -1, 0, 1 and a scale s for each group of columns."""

    bits = 2  # as small integers take; packed, five codes take a byte

    @property
    def name(self) -> str:
        """The format's name in plans and messages."""
        return f"ternary-g{self.group}"

    def packed_member(self, info: TensorInfo) -> TensorInfo:
        """Return the tensor that stores the codes of the weight `info`."""
        return TensorInfo(f"{info.name}_packed", "U8", (ternary_bytes(info.numel),))

    @classmethod
    def find(cls, name: str, tensors: Mapping[str, TensorInfo], raw: RawBytes) -> Weight | None:
        """Return the weight that the stored tensor `name` is a member of; None where it is of none."""
        weight = grouped_weight_name(name)
        if weight is None or not packed_as_bytes(weight, tensors):
            return None
        info, group = read_shape_and_group(weight, tensors, raw)
        fmt = cls(group)
        return stored_weight(info, fmt, fmt.members(info).values(), tensors)

    def check_values(self, weight: Tensor, name: str) -> None:
        """Raise `BadInputError` for a weight whose scales fp16 does not hold; see `NumberFormat.check_values`."""
        from ditmoe_cli.formats.scaling import group_extents, require_group_scales

        require_group_scales(weight, group_extents(weight, self.group), self.group, 2.0, name, self.name)

    def grid(self, weight: Tensor, importance: Tensor | None = None, *, name: str = "weight") -> Grid:
        """Return the grid on which to round a weight (out, in); see `NumberFormat.grid`."""
        from ditmoe_cli.formats.ternary_arithmetic import ternary_grid

        weight = weight.detach()
        self.check_values(weight, name)
        return ternary_grid(self, weight, importance, self.group)

    def load(self, info: TensorInfo, members: Mapping[str, Tensor]) -> PackedWeight:
        """Return what stays of a weight in memory: codes and scales.

        Raises `BadInputError` that names the tensor of codes where a byte stands for none.
        """
        from ditmoe_cli.formats.packing import check_base3
        from ditmoe_cli.formats.ternary_arithmetic import unpack_ternary

        stored = self.members(info)
        tensors = {part: members[stored[part].name] for part in ("packed", "scale")}
        try:
            check_base3(tensors["packed"], info.shape)
        except BadInputError as error:
            raise BadInputError(f"tensor {stored['packed'].name!r}: {error}") from None
        return PackedWeight(tensors, info.shape, partial(unpack_ternary, group=self.group))

    def trained_parts(self, info: TensorInfo, codes: bool = False) -> dict[str, int]:  # noqa: ARG002
        """Return the parts that training changes, and how many values each has: the scales."""
        return {"scale": info.shape[0] * self.groups(info.shape[1])}

    def composition(self, info: TensorInfo, members: Mapping[str, Tensor]) -> Composition:
        """Return how the matrix of the weight `info` is made of scales. Raises `BadInputError` as `load` does."""
        from ditmoe_cli.formats.ternary_arithmetic import composed_ternary

        packed = self.load(info, members).tensors["packed"]
        return partial(composed_ternary, packed, shape=info.shape, group=self.group)
