"""Integer formats: int{b}-g{g} (b bits a weight, groups of g columns) and their symmetric kind int{b}-g{g}-sym.

b is 2, 3, 4, 5, 6 or 8 and g 32, 64 or 128. A weight ``X.weight`` of shape (out, in) becomes, with G = ceil(in/g):

           X.weight_packed                              I32  (out, ceil(in*b/32))
           X.weight_scale                               F16  (out, G)        w = (code - zero) * scale
           X.weight_zero_point                          I32  (ceil(out*b/32), G)    absent of -sym: zero = 2^(b-1)
           X.weight_shape                               I32  (2,)            out, in; (3,) if in < 32: out, in, b

Codes and zero points are unsigned and packed without gaps, the lowest bit first. Codes run along the rows: code j of a
row takes bits b*j to b*j + b - 1 of the row, whose bit k is bit k mod 32 of word k // 32; codes may straddle words, and
each row begins with a new one. Zero points run down the columns in the same way. b follows from the words of a row,
where rows have at least 32 columns; the words of shorter ones do not tell widths apart, and so the shape names b.

compressed-tensors packs codes and zero points into the same bits (https://github.com/vllm-project/compressed-tensors,
pack_quantized): all widths since its version 0.18, and 2, 4 and 8 bits in earlier ones, which padded the words of other
widths. So it reads these tensors where rows are whole groups, as it demands. It writes two things otherwise, and its
files are not read here: X.weight_shape in I64, and scales in the dtype of the model.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.base import Composition, Grid, PackedWeight, RawBytes, Weight, stored_weight
from ditmoe_cli.formats.grouped import GroupedFormat, grouped_weight_name, packed_as_bytes, read_shape_and_group
from ditmoe_cli.formats.packed_sizes import FEWEST_TELLING, packed_words

if TYPE_CHECKING:
    from torch import Tensor

    from ditmoe_cli.formats.scaling import Extents
    from ditmoe_cli.formats.trained_parts import TrainedPart

BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Integer(GroupedFormat):
    """w = (c - z) s with codes c in 0 … 2^b - 1, and a scale s and a whole zero point z for each group of columns.

    b is the `width`; z = 2^(b-1) in `symmetric` formats, which store none.
    """

    width: int
    symmetric: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.width

    @property
    def name(self) -> str:
        """The format's name in plans and messages."""
        return f"int{self.bits}-g{self.group}{'-sym' if self.symmetric else ''}"

    def packed_member(self, info: TensorInfo) -> TensorInfo:
        """Return the tensor that stores the codes of the weight `info`."""
        return TensorInfo(f"{info.name}_packed", "I32", (info.shape[0], packed_words(info.shape[1], self.bits)))

    def members(self, info: TensorInfo) -> dict[str, TensorInfo]:
        """Return the tensors that store the weight `info`, by the part that each plays."""
        members = super().members(info)
        shape = members.pop("shape")
        if not self.symmetric:
            words = (packed_words(info.shape[0], self.bits), self.groups(info.shape[1]))
            members["zero_point"] = TensorInfo(f"{info.name}_zero_point", "I32", words)
        if info.shape[1] < FEWEST_TELLING:
            shape = replace(shape, shape=(3,))
        return members | {"shape": shape}

    @classmethod
    def find(cls, name: str, tensors: Mapping[str, TensorInfo], raw: RawBytes) -> Weight | None:
        """Return the weight that the stored tensor `name` is a member of; None where it is of none."""
        weight = grouped_weight_name(name)
        if weight is None or packed_as_bytes(weight, tensors):
            return None
        info, group = read_shape_and_group(weight, tensors, raw)
        rows, columns = info.shape
        packed = tensors[f"{weight}_packed"]
        told = BITS if columns >= FEWEST_TELLING else _named_bits(weight, raw)
        bits = next((b for b in told if packed.shape == (rows, packed_words(columns, b))), None)
        if bits is None:
            raise BadInputError(
                f"tensor {packed.name!r} has shape {list(packed.shape)}, which no {', '.join(map(str, told))} bits "
                f"give for a weight of {[rows, columns]}"
            )
        fmt = cls(group, bits, symmetric=f"{weight}_zero_point" not in tensors)
        fmt._refuse_old_zero_points(info, tensors)
        return stored_weight(info, fmt, fmt.members(info).values(), tensors)

    def check_values(self, weight: Tensor, name: str) -> None:
        """Raise `BadInputError` for a weight whose scales fp16 does not hold; see `NumberFormat.check_values`."""
        self._held_extents(weight, name)

    def _held_extents(self, weight: Tensor, name: str) -> Extents:
        """Return the extents of a weight's groups. Raises `BadInputError` as `check_values` does."""
        from ditmoe_cli.formats.scaling import group_extents, require_group_scales

        extents = group_extents(weight, self.group)
        steps = 2.0 ** (self.bits - 1) if self.symmetric else 2.0**self.bits - 1
        require_group_scales(weight, extents, self.group, steps, name, self.name)
        return extents

    def _refuse_old_zero_points(self, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> None:
        """Raise `BadInputError` for zero points that run along the rows, as development versions packed them.

        Shapes differ unless the weight is one row of one group, whose only zero point has the same bits either way.
        """
        rows, columns = info.shape
        old = (rows, packed_words(self.groups(columns), self.bits))
        zero = self.members(info).get("zero_point")
        stored = tensors.get(zero.name) if zero is not None else None
        if zero is not None and stored is not None and stored.shape == old != zero.shape:
            raise BadInputError(
                f"tensor {stored.name!r} holds zero points packed along rows, as ditmoe did before it followed "
                "compressed-tensors, which packs them down columns; quantise the original checkpoint again"
            )

    def grid(self, weight: Tensor, importance: Tensor | None = None, *, name: str = "weight") -> Grid:
        """Return the grid on which to round a weight (out, in); see `NumberFormat.grid`."""
        from ditmoe_cli.formats.integer_arithmetic import integer_grid

        weight = weight.detach()
        extents = self._held_extents(weight, name)
        return integer_grid(
            self, weight, extents, importance, bits=self.bits, group=self.group, symmetric=self.symmetric
        )

    def load(self, info: TensorInfo, members: Mapping[str, Tensor]) -> PackedWeight:
        """Return what stays of a weight in memory: codes, scales and zero points."""
        from ditmoe_cli.formats.integer_arithmetic import unpack_integer

        stored = self.members(info)
        tensors = {part: members[stored[part].name] for part in stored if part != "shape"}
        return PackedWeight(tensors, info.shape, partial(unpack_integer, bits=self.bits, group=self.group))

    @property
    def has_whole_codes(self) -> bool:
        """Whether the codes are whole numbers of a uniform grid, which training may change: they are."""
        return True

    def trained_parts(self, info: TensorInfo, codes: bool = False) -> dict[str, int]:
        """Return the parts that training changes, and how many values each has: scales, and `codes`.

        Zero points stay: a step of one moves a whole group by a scale, and training with rounded ones ended worse.
        """
        scales = info.shape[0] * self.groups(info.shape[1])
        return {"scale": scales, **({"packed": info.numel} if codes else {})}

    def trained_part(self, info: TensorInfo, part: str, tensor: Tensor) -> TrainedPart:
        """Return one of the `trained_parts` of the weight `info`, stored as `tensor`, as training sees it."""
        from ditmoe_cli.formats.integer_arithmetic import trained_codes

        return trained_codes(info.shape[1], self.bits) if part == "packed" else super().trained_part(info, part, tensor)

    def composition(self, info: TensorInfo, members: Mapping[str, Tensor]) -> Composition:
        """Return how the matrix of the weight `info` is made of scales, and of codes where these are trained."""
        from ditmoe_cli.formats.integer_arithmetic import composed_integer

        tensors = self.load(info, members).tensors
        return partial(composed_integer, tensors, shape=info.shape, bits=self.bits, group=self.group)


def _named_bits(weight: str, raw: RawBytes) -> tuple[int, ...]:
    """Return the width that the shape of a weight of short rows names; none where it names none that there is."""
    values = raw(f"{weight}_shape")
    bits = struct.unpack("<i", values[8:12])[0] if len(values) == 12 else 0
    return tuple(b for b in BITS if b == bits)
