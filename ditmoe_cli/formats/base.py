"""The contract of number formats: which tensors store a weight, and how a matrix is rounded, packed and unpacked.

Importing a format takes neither torch nor numpy, since dry runs and help texts need names, members and sizes only.
Methods that compute import torch when they are called; a family's longer arithmetic stands in a module beside it, as
`integer_arithmetic` beside `integer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from ditmoe_cli.formats.columns import Columns
    from ditmoe_cli.formats.trained_parts import TrainedPart

RawBytes = Callable[[str], bytes]  # of a stored tensor, by its name
Composition = Callable[[Mapping[str, "Tensor"]], "Tensor"]
"""Takes the numbers of trained parts, by part, and returns the matrix (out, in) in fp32, with gradients to them."""


@dataclass(frozen=True)
class Weight:
    """A tensor as the model sees it.

    Attributes:
        info: name, logical dtype and logical shape.
        stored_as: the format; None of a plain tensor, whose only member is itself.
        members: names of the tensors that store it. The base of an expert's difference is the first member of each
            expert's weight, and no weight itself.
    """

    info: TensorInfo
    stored_as: StoredFormat | None
    members: tuple[str, ...]

    @property
    def format(self) -> str | None:
        """The format's name; None of a plain tensor."""
        return None if self.stored_as is None else self.stored_as.name

    @property
    def quantized(self) -> bool:
        """Whether the weight stays packed in memory."""
        return isinstance(self.stored_as, NumberFormat)

    def unpack(self, members: Mapping[str, Tensor]) -> Tensor:
        """Return the weight in its logical dtype; `members` are its stored tensors by name.

        Raises `BadInputError` that names a tensor whose bytes stand for no codes.
        """
        return members[self.info.name] if self.stored_as is None else self.stored_as.unpack(self.info, members)


class StoredFormat(ABC):
    """A way to store a weight in other tensors than itself."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The format's name in plans and messages."""

    @abstractmethod
    def members(self, info: TensorInfo) -> dict[str, TensorInfo]:
        """Return the tensors that store the weight `info`, by the part that each plays."""

    @classmethod
    def find(cls, name: str, tensors: Mapping[str, TensorInfo], raw: RawBytes) -> Weight | None:  # noqa: ARG003
        """Return the weight of this family that the stored tensor `name` is a member of; None where it is of none.

        Raises `BadInputError` that names a tensor where members are missing or do not fit together.
        """
        return None

    @abstractmethod
    def unpack(self, info: TensorInfo, members: Mapping[str, Tensor]) -> Tensor:
        """Return the weight `info` in its logical dtype; `members` are its stored tensors by name."""

    @property
    def has_whole_codes(self) -> bool:
        """Whether the codes are whole numbers of a uniform grid, which training may change."""
        return False

    @abstractmethod
    def trained_parts(self, info: TensorInfo, codes: bool = False) -> dict[str, int]:
        """Return the parts that training changes, and how many values each has; of `codes` only where asked for."""

    @abstractmethod
    def trained_part(self, info: TensorInfo, part: str, tensor: Tensor) -> TrainedPart:
        """Return one of the `trained_parts` of the weight `info`, stored as `tensor`, as training sees it."""

    @abstractmethod
    def composition(self, info: TensorInfo, members: Mapping[str, Tensor]) -> Composition:
        """Return how the matrix of the weight `info` is made of the numbers of its trained parts.

        `members` are its stored tensors by name. Codes that are not among the numbers are as stored; of the numbers
        that are stored the matrix is what a layer multiplies by, rounded as little.
        """


class NumberFormat(StoredFormat):
    """A format of fewer bits, in which weights also stay packed in memory."""

    cuttable: ClassVar[bool] = False  # whether the pieces of a matrix may be stored so

    @property
    @abstractmethod
    def bits(self) -> float:
        """Bits of a code."""

    @abstractmethod
    def accepts(self, info: TensorInfo) -> bool:
        """Return whether the dtype and shape of a weight allow the format."""

    @abstractmethod
    def grid(self, weight: Tensor, importance: Tensor | None = None, *, name: str = "weight") -> Grid:
        """Return the grid on which to round a weight (out, in).

        Args:
            weight: floating.
            importance: of each column (in,), at least 0; equal where none is given. Only integer and ternary grids, and
                pieces of them, heed it.
            name: of the tensor, for errors.

        Raises:
            BadInputError: the format does not hold the values (`check_values`).
        """

    def check_values(self, weight: Tensor, name: str) -> None:
        """Raise `BadInputError` that names a weight (out, in) whose values the format does not hold.

        Those are values beyond the range of its scales, and values so small that the rounding of scales alone would
        change the weight by more than 2^-8 of its norm. Called by `grid`, and before long work.
        """
        del weight, name

    def pack(self, weight: Tensor, info: TensorInfo, importance: Tensor | None = None) -> dict[str, Tensor]:
        """Quantise a weight (out, in); return its members by name. Raises `BadInputError` as `grid` does."""
        return self.grid(weight, importance, name=info.name).pack(weight, info)

    @abstractmethod
    def load(self, info: TensorInfo, members: Mapping[str, Tensor]) -> PackedWeight:
        """Return what stays of a weight in memory; `members` are its stored tensors by name.

        Raises `BadInputError` that names a tensor whose bytes stand for no codes, or describe none.
        """

    def trained_part(self, info: TensorInfo, part: str, tensor: Tensor) -> TrainedPart:  # noqa: ARG002
        """Return one of the `trained_parts` of the weight `info`, stored as `tensor`: factors of its scales."""
        from ditmoe_cli.formats.trained_parts import Factors

        return Factors(tensor)

    def dequantize(self, info: TensorInfo, members: Mapping[str, Tensor]) -> Tensor:
        """Return the weight `info` (out, in) in fp32; `members` are its stored tensors by name."""
        return self.load(info, members).matrix()

    def unpack(self, info: TensorInfo, members: Mapping[str, Tensor]) -> Tensor:
        """Return the weight `info` (out, in) in its logical dtype; `members` are its stored tensors by name."""
        import torch

        from ditmoe_cli.files.reader import torch_dtype

        dtype = torch_dtype(info.dtype)
        values = self.dequantize(info, members)
        if dtype == torch.float16:  # the last step below fp16's end may be rounded above it
            values.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
        return values.to(dtype)


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight in memory.

    Attributes:
        tensors: what it is stored in, by the part that each plays.
        shape: out, in.
        unpack: writes the matrix of such tensors into another one (out, in) of any floating dtype, rounded as ``to``
            rounds fp32 values.
    """

    tensors: Mapping[str, Tensor]
    shape: tuple[int, ...]
    unpack: Callable[[Mapping[str, Tensor], Tensor], None]

    def matrix(self) -> Tensor:
        """Return the matrix (out, in) in fp32."""
        import torch

        matrix = torch.empty(self.shape, device=next(iter(self.tensors.values())).device)
        self.unpack(self.tensors, matrix)
        return matrix


@dataclass(frozen=True)
class Grid(ABC):
    """The values that a matrix of `shape` (out, in) can take in `format`."""

    format: NumberFormat
    shape: tuple[int, int]

    @abstractmethod
    def round(self, values: Tensor, columns: Tensor) -> Tensor:
        """Return values (out, n) rounded to the nearest that the grids of their `columns` (n,) hold, in fp32."""

    @abstractmethod
    def columns(self, columns: Tensor) -> Columns:
        """Return the grids of `columns` (n,), in that order; they round to what `round` does, to the bit."""

    @abstractmethod
    def parts(self, weight: Tensor, info: TensorInfo) -> dict[str, Tensor]:
        """Return the tensors that store a weight (out, in), rounded to the nearest, by the part that each plays."""

    def pack(self, weight: Tensor, info: TensorInfo) -> dict[str, Tensor]:
        """Return the members of the weight `info` by name, its values being rounded to the nearest.

        Raises `ValueError` for a weight of another shape than the grid's.
        """
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"a grid of {self.format.name} {self.shape} does not take {tuple(weight.shape)}")
        parts = self.parts(weight.detach(), info)
        return {member.name: parts[part] for part, member in self.format.members(info).items()}


def stored_weight(
    info: TensorInfo, fmt: StoredFormat, members: Iterable[TensorInfo], tensors: Mapping[str, TensorInfo]
) -> Weight:
    """Return the weight that is stored as `members`.

    Raises `BadInputError` that names a member which `tensors` lack, or hold in another dtype or shape.
    """
    wanted = tuple(members)
    for member in wanted:
        stored = tensors.get(member.name)
        if stored != member:
            state = f"{stored.dtype} {list(stored.shape)}" if stored else "missing"
            raise BadInputError(
                f"tensor {member.name!r} of the {fmt.name} weight {info.name!r} is {state}, "
                f"expected {member.dtype} {list(member.shape)}"
            )
    return Weight(info, fmt, tuple(member.name for member in wanted))


def require_matrix(info: TensorInfo, fmt: StoredFormat) -> None:
    """Raise `BadInputError` for a weight that is no matrix."""
    if len(info.shape) != 2:
        raise BadInputError(f"the {fmt.name} weight {info.name!r} has shape {list(info.shape)}, which is no matrix")
