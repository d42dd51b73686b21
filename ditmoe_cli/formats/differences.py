"""Experts' matrices that are stored as what they differ from a base by.

A matrix X.weight (out, in) of an expert, X = blocks.i.moe.experts.e.gate_proj, up_proj or down_proj, then has no tensor
of its own name. It is the base of its block, in the dtype that the matrix has to the model, plus a product of factors
in that dtype, or a scale times codes:

    base       blocks.i.moe.base.gate_proj.weight      ...  (out, in)       likewise of up_proj and down_proj
    svd        X.weight.delta_left                     ...  (out, r)
               X.weight.delta_right                    ...  (r, in)
    ternary    X.weight.delta_ternary                  U8   (ceil(out*in/5),)   codes -1, 0, 1, five a byte in base 3
               X.weight.delta_scale                    F32  ()

Such weights are put together when they are loaded, and stay whole in memory.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import FLOATING, TensorInfo
from ditmoe_cli.files.names import BASE, MATRICES, in_block, split_name
from ditmoe_cli.formats.base import Composition, RawBytes, StoredFormat, Weight, stored_weight
from ditmoe_cli.formats.packed_sizes import ternary_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ditmoe_cli.formats.trained_parts import TrainedPart

DeltaFormat = Literal["svd", "ternary"]


def base_name(name: str) -> str:
    """Return the name of the base that the matrix `name` of an expert is stored as a difference from.

    Raises `BadInputError` for what is no matrix of an expert.
    """
    parts = split_name(name)
    if parts.block is None or parts.expert is None or parts.rest not in {f"{matrix}.weight" for matrix in MATRICES}:
        raise BadInputError(f"{name!r} is stored as a difference, but only matrices of routed experts may be")
    return in_block(parts.block, f"{BASE}.{parts.rest}")


class Difference(StoredFormat):
    """A base that the experts of a block share, and each expert's difference from it."""

    PARTS: ClassVar[tuple[str, ...]]  # the ends of the names of a difference's members

    @abstractmethod
    def difference_members(self, info: TensorInfo) -> dict[str, TensorInfo]:
        """Return the tensors that store the difference of the matrix `info` from its base, by the part of each."""

    def members(self, info: TensorInfo) -> dict[str, TensorInfo]:
        """Return the tensors that store the matrix `info`, by the part that each plays, the base first."""
        return {"base": replace(info, name=base_name(info.name))} | self.difference_members(info)

    @classmethod
    @abstractmethod
    def of_stored(cls, name: str, tensors: Mapping[str, TensorInfo]) -> Self:
        """Return the format in which `tensors` store the matrix `name`."""

    @classmethod
    def find(cls, name: str, tensors: Mapping[str, TensorInfo], raw: RawBytes) -> Weight | None:  # noqa: ARG003
        """Return the matrix whose difference the stored tensor `name` is a part of; None where it is of none."""
        matrix, _, part = name.rpartition(".")
        if not matrix or part not in cls.PARTS:
            return None
        fmt, base = cls.of_stored(matrix, tensors), tensors.get(base_name(matrix))
        if base is None:
            raise BadInputError(f"the {fmt.name} weight {matrix!r} stands without its base {base_name(matrix)!r}")
        if matrix in tensors:
            raise BadInputError(
                f"tensor {matrix!r} stands beside its difference from {base.name!r}; one of them is too many"
            )
        if len(base.shape) != 2 or base.dtype not in FLOATING:
            raise BadInputError(
                f"tensor {base.name!r} is {base.dtype} {list(base.shape)}, but the base of {matrix!r} has to be a "
                "floating matrix"
            )
        info = replace(base, name=matrix)
        try:
            return stored_weight(info, fmt, fmt.members(info).values(), tensors)
        except BadInputError as error:
            shape = f"{base.dtype} {list(base.shape)}"
            raise BadInputError(f"{error}, as its base {base.name!r} of {shape} implies") from None

    def unpack(self, info: TensorInfo, members: Mapping[str, Tensor]) -> Tensor:
        """Return the matrix `info` (out, in), base plus difference, in its logical dtype.

        Computed in fp32, or in fp64 if that is the dtype. Raises `BadInputError` for bytes that stand for no codes.
        """
        import torch

        from ditmoe_cli.files.reader import torch_dtype

        dtype = torch_dtype(info.dtype)
        return self.restored(self.decoded(info, members), torch.promote_types(dtype, torch.float32)).to(dtype)

    def decoded(self, info: TensorInfo, members: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return base and difference of the matrix `info` by part, of stored tensors by name."""
        return {part: members[member.name] for part, member in self.members(info).items()}

    def trained_part(self, info: TensorInfo, part: str, tensor: Tensor) -> TrainedPart:  # noqa: ARG002
        """Return one of the `trained_parts`, stored as `tensor`, as training sees it; experts share their base's."""
        from ditmoe_cli.formats.trained_parts import Cast, Factors

        return Factors(tensor) if part == "scale" else Cast(tensor.dtype)

    def composition(self, info: TensorInfo, members: Mapping[str, Tensor]) -> Composition:
        """Return how the matrix `info` is made of the numbers of base and difference, rounded to its dtype."""
        import torch

        from ditmoe_cli.files.reader import torch_dtype
        from ditmoe_cli.formats.trained_parts import rounded_through

        dtype, decoded = torch_dtype(info.dtype), self.decoded(info, members)

        def matrix(numbers: Mapping[str, Tensor]) -> Tensor:
            return rounded_through(self.restored({**decoded, **numbers}, torch.float32), dtype)

        return matrix

    @abstractmethod
    def restored(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return base plus difference, of `decoded` parts, computed in `dtype`."""


@dataclass(frozen=True)
class SvdDifference(Difference):
    """base + left right, with factors of `rank` r."""

    rank: int
    name = "svd"
    PARTS = ("delta_left", "delta_right")

    def difference_members(self, info: TensorInfo) -> dict[str, TensorInfo]:
        """Return the tensors that store the difference of the matrix `info` from its base, by the part of each."""
        rows, columns = info.shape
        return {
            "left": TensorInfo(f"{info.name}.delta_left", info.dtype, (rows, self.rank)),
            "right": TensorInfo(f"{info.name}.delta_right", info.dtype, (self.rank, columns)),
        }

    def trained_parts(self, info: TensorInfo, codes: bool = False) -> dict[str, int]:  # noqa: ARG002
        """Return the parts that training changes, and how many values each has: the base and both factors."""
        rows, columns = info.shape
        return {"base": info.numel, "left": rows * self.rank, "right": self.rank * columns}

    @classmethod
    def of_stored(cls, name: str, tensors: Mapping[str, TensorInfo]) -> Self:
        """Return the format of the matrix `name`: its rank is the columns of the left factor, or rows of the right."""
        sides = ((f"{name}.delta_left", -1), (f"{name}.delta_right", 0))
        return cls(
            next((tensors[side].shape[axis] for side, axis in sides if side in tensors and tensors[side].shape), 0)
        )

    @staticmethod
    def pack(name: str, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        """Return the tensors that store the difference left right of the matrix `name`, by name."""
        return {f"{name}.delta_left": left, f"{name}.delta_right": right}

    def restored(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return base plus difference, of `decoded` parts, computed in `dtype`."""
        import torch

        return torch.addmm(parts["base"].to(dtype), parts["left"].to(dtype), parts["right"].to(dtype))


@dataclass(frozen=True)
class TernaryDifference(Difference):
    """base + scale · codes, with codes -1, 0 and 1."""

    name = "ternary"
    PARTS = ("delta_ternary", "delta_scale")

    def difference_members(self, info: TensorInfo) -> dict[str, TensorInfo]:
        """Return the tensors that store the difference of the matrix `info` from its base, by the part of each."""
        return {
            "codes": TensorInfo(f"{info.name}.delta_ternary", "U8", (ternary_bytes(info.numel),)),
            "scale": TensorInfo(f"{info.name}.delta_scale", "F32", ()),
        }

    def trained_parts(self, info: TensorInfo, codes: bool = False) -> dict[str, int]:  # noqa: ARG002
        """Return the parts that training changes, and how many values each has: the base and the scale."""
        return {"base": info.numel, "scale": 1}

    @classmethod
    def of_stored(cls, name: str, tensors: Mapping[str, TensorInfo]) -> Self:  # noqa: ARG003
        """Return the format."""
        return cls()

    @staticmethod
    def pack(name: str, codes: Tensor, scale: float) -> dict[str, Tensor]:
        """Return the tensors that store the difference scale · codes of the matrix `name`, by name."""
        import torch

        from ditmoe_cli.formats.packing import pack_base3

        return {f"{name}.delta_ternary": pack_base3(codes), f"{name}.delta_scale": torch.tensor(scale)}

    def decoded(self, info: TensorInfo, members: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return base, codes (out, in) and scale of the matrix `info` by part, of stored tensors by name."""
        from ditmoe_cli.formats.packing import unpack_base3

        parts = super().decoded(info, members)
        try:
            return {**parts, "codes": unpack_base3(parts["codes"], info.shape)}
        except BadInputError as error:
            raise BadInputError(f"tensor '{info.name}.delta_ternary': {error}") from None

    def restored(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return base plus difference, of `decoded` parts, computed in `dtype`."""
        return parts["base"].to(dtype) + parts["codes"] * parts["scale"].to(dtype)


def difference_format(kind: DeltaFormat, rank: int) -> Difference:
    """Return the format of a kind of difference; `rank` is for ``svd``."""
    return SvdDifference(rank) if kind == "svd" else TernaryDifference()
