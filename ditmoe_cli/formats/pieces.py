"""Formats of pieces: a matrix that is cut along its neurons, each piece stored in a format of its own.

Cut are rows of gate_proj and up_proj (and of any other weight), and columns of down_proj. ``X.weight`` then has no
tensor of its own name. Its pieces are weights of integer and ternary formats, numbered from 0, at least two, and are
joined in that order:

    pieces     X.pieces.0.weight_packed, ...           of shape (n_0, in), or (out, n_0) of down_proj
               X.pieces.1.weight_packed, ...           (n_1, in), or (out, n_1)

The format's name is rows:f_0*n_0+f_1*n_1+... or columns:f_0*n_0+f_1*n_1+..., as rows:int4-g64*64+int2-g64*192. No file
says which neurons they are: those of an expert may stand in any order that its three matrices share.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.names import MATRICES
from ditmoe_cli.formats.base import Composition, Grid, NumberFormat, PackedWeight, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from ditmoe_cli.formats.columns import Columns
    from ditmoe_cli.formats.trained_parts import TrainedPart

AXES = ("rows", "columns")
_PIECE_NAME = re.compile(r"(.+)\.pieces\.(\d+)\.weight")


def neuron_axis(name: str) -> int:
    """Return the axis along which the weight `name` may be cut: 1, its columns, of down_proj, and 0 of all others."""
    return int(name.endswith(f"{MATRICES[2]}.weight"))


@dataclass(frozen=True)
class Pieces(NumberFormat):
    """Pieces along one axis of a matrix: 0 for pieces of its rows, 1 of its columns.

    `formats` are those of the pieces, in order, and `counts` their numbers of rows or columns.
    """

    axis: int
    formats: tuple[NumberFormat, ...]
    counts: tuple[int, ...]

    @property
    def name(self) -> str:
        """The format's name, as ``rows:int4-g64*64+int2-g64*192``."""
        pieces = (f"{fmt.name}*{count}" for fmt, count in zip(self.formats, self.counts, strict=True))
        return f"{AXES[self.axis]}:{'+'.join(pieces)}"

    @property
    def label(self) -> str:
        """The name without the sizes of the pieces, by which weights may be counted."""
        return f"{AXES[self.axis]}:{'+'.join(fmt.name for fmt in self.formats)}"

    @property
    def bits(self) -> float:
        """Bits of a code, on average over the matrix."""
        return sum(fmt.bits * count for fmt, count in zip(self.formats, self.counts, strict=True)) / sum(self.counts)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The rows or columns of each piece."""
        return tuple(slice(*ends) for ends in pairwise(accumulate(self.counts, initial=0)))

    @property
    def places(self) -> tuple[tuple[slice, slice], ...]:
        """The rows and the columns of each piece."""
        return tuple((part, slice(None)) if self.axis == 0 else (slice(None), part) for part in self.slices)

    def infos(self, info: TensorInfo) -> list[TensorInfo]:
        """Return the pieces of the weight `info` as weights."""
        stem = info.name.removesuffix(".weight")
        return [
            replace(info, name=f"{stem}.pieces.{i}.weight", shape=self._shape(info.shape, count))
            for i, count in enumerate(self.counts)
        ]

    def _shape(self, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
        return (count, *shape[1:]) if self.axis == 0 else (shape[0], count)

    def _each(self, info: TensorInfo) -> Iterator[tuple[int, NumberFormat, TensorInfo]]:
        """Yield each piece's number, format and weight."""
        for i, (fmt, piece) in enumerate(zip(self.formats, self.infos(info), strict=True)):
            yield i, fmt, piece

    def accepts(self, info: TensorInfo) -> bool:
        """Return whether the pieces add up to the weight along the axis of its neurons, and each takes its format."""
        fits = len(info.shape) == 2 and self.axis == neuron_axis(info.name)
        return (
            fits
            and sum(self.counts) == info.shape[self.axis]
            and all(fmt.accepts(piece) for _, fmt, piece in self._each(info))
        )

    def members(self, info: TensorInfo) -> dict[str, TensorInfo]:
        """Return the tensors that store the weight `info`, piece by piece, by number and part."""
        return {
            _part(part, i): member for i, fmt, piece in self._each(info) for part, member in fmt.members(piece).items()
        }

    def check_values(self, weight: Tensor, name: str) -> None:
        """Raise `BadInputError` for a weight one of whose pieces does not hold its values."""
        for fmt, place in zip(self.formats, self.places, strict=True):
            fmt.check_values(weight[place], name)

    def grid(self, weight: Tensor, importance: Tensor | None = None, *, name: str = "weight") -> Grid:
        """Return the grid on which to round a weight (out, in): that of each piece, in its rows or columns."""
        grids = [
            fmt.grid(weight[place], importance if importance is None else importance[place[1]], name=name)
            for fmt, place in zip(self.formats, self.places, strict=True)
        ]
        return PiecedGrid(self, (weight.shape[0], weight.shape[1]), tuple(grids))

    def load(self, info: TensorInfo, members: Mapping[str, Tensor]) -> PackedWeight:
        """Return what stays of a weight in memory: the tensors of all pieces."""
        pieces = [fmt.load(piece, members) for _, fmt, piece in self._each(info)]
        tensors = {_part(part, i): tensor for i, each in enumerate(pieces) for part, tensor in each.tensors.items()}
        unpacks = tuple((tuple(each.tensors), each.unpack) for each in pieces)
        return PackedWeight(tensors, info.shape, partial(_join, pieces=unpacks, places=self.places))

    @property
    def has_whole_codes(self) -> bool:
        """Whether the codes of some piece are whole numbers of a uniform grid, which training may change."""
        return any(fmt.has_whole_codes for fmt in self.formats)

    def trained_parts(self, info: TensorInfo, codes: bool = False) -> dict[str, int]:
        """Return the parts of all pieces that training changes, and how many values each has."""
        return {
            _part(part, i): count
            for i, fmt, piece in self._each(info)
            for part, count in fmt.trained_parts(piece, codes).items()
        }

    def trained_part(self, info: TensorInfo, part: str, tensor: Tensor) -> TrainedPart:
        """Return one of the `trained_parts` of the weight `info`, stored as `tensor`, as training sees it."""
        own, _, number = part.rpartition("_")
        return self.formats[int(number)].trained_part(self.infos(info)[int(number)], own, tensor)

    def composition(self, info: TensorInfo, members: Mapping[str, Tensor]) -> Composition:
        """Return how the matrix of the weight `info` is made of the numbers of its pieces."""
        return partial(_composed, [fmt.composition(piece, members) for _, fmt, piece in self._each(info)], self.axis)


def _part(part: str, piece: int) -> str:
    return f"{part}_{piece}"


def _composed(pieces: Sequence[Composition], axis: int, numbers: Mapping[str, Tensor]) -> Tensor:
    """Return the matrix of pieces, side by side along an axis, of `numbers` by part and piece."""
    import torch

    own: list[dict[str, Tensor]] = [{} for _ in pieces]
    for part, value in numbers.items():
        name, _, piece = part.rpartition("_")
        own[int(piece)][name] = value
    return torch.cat([matrix(parts) for matrix, parts in zip(pieces, own, strict=True)], dim=axis)


def _join(
    tensors: Mapping[str, Tensor],
    out: Tensor,
    *,
    pieces: Sequence[tuple[Sequence[str], Callable[[Mapping[str, Tensor], Tensor], None]]],
    places: Sequence[tuple[slice, slice]],
) -> None:
    """Write the weight whose `places` hold `pieces`, each its parts and how to unpack them, into `out`."""
    for i, ((parts, unpack), place) in enumerate(zip(pieces, places, strict=True)):
        unpack({part: tensors[_part(part, i)] for part in parts}, out[place])


@dataclass(frozen=True)
class PiecedGrid(Grid):
    """The values of each piece's grid in its rows or columns."""

    format: Pieces
    grids: tuple[Grid, ...]

    def round(self, values: Tensor, columns: Tensor) -> Tensor:
        """Return values (out, n) rounded to the nearest that the grids of their `columns` (n,) hold, in fp32."""
        import torch

        rounded = torch.empty_like(values, dtype=torch.float32)
        for part, grid in zip(self.format.slices, self.grids, strict=True):
            if self.format.axis == 0:
                rounded[part] = grid.round(values[part], columns)
                continue
            own = (columns >= part.start) & (columns < part.stop)
            if bool(own.any()):
                rounded[:, own] = grid.round(values[:, own], columns[own] - part.start)
        return rounded

    def columns(self, columns: Tensor) -> Columns:
        """Return the grids of `columns` (n,). All formats of pieces are uniform."""
        from ditmoe_cli.formats.columns import Columns, beside

        if self.format.axis == 0:
            return beside([grid.columns(columns) for grid in self.grids])
        tables: list[Tensor] = []
        for part, grid in zip(self.format.slices, self.grids, strict=True):
            own = ((columns >= part.start) & (columns < part.stop))[:, None]
            found = grid.columns((columns - part.start).clamp_(0, part.stop - part.start - 1))
            rule, tables = (
                found.rule,
                [
                    number if not tables else number.where(own, before)
                    for number, before in zip(found.tables, tables or found.tables, strict=True)
                ],
            )
        return Columns(rule, tuple(tables))

    def parts(self, weight: Tensor, info: TensorInfo) -> dict[str, Tensor]:
        """Return the tensors that store a weight (out, in), rounded to the nearest, by piece and part."""
        pieces = zip(self.grids, self.format.places, self.format.infos(info), strict=True)
        return {
            _part(part, i): tensor
            for i, (grid, place, piece) in enumerate(pieces)
            for part, tensor in grid.parts(weight[place], piece).items()
        }


def join_pieces(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Return weights with those that are pieces of one joined.

    Raises `BadInputError` that names a piece which is missing or does not fit, or a weight that is stored twice.
    """
    whole: dict[str, Weight] = {}
    pieces: dict[str, dict[str, Weight]] = {}
    for name, weight in weights.items():
        match = _PIECE_NAME.fullmatch(name)
        if match is None:
            whole[name] = weight
        else:
            pieces.setdefault(match[1], {})[name] = weight
    for stem, own in pieces.items():
        name = f"{stem}.weight"
        if name in whole:
            raise BadInputError(f"the weight {name!r} is stored twice, in one piece and in several")
        whole[name] = _of_pieces(name, list(_in_order(stem, own)))
    return whole


def is_piece(name: str) -> bool:
    """Return whether the weight `name` is named as a piece of one."""
    return _PIECE_NAME.fullmatch(name) is not None


def _in_order(stem: str, pieces: Mapping[str, Weight]) -> Iterator[Weight]:
    """Yield the pieces of a weight by their numbers, which have to begin with 0 and leave none out."""
    for i in range(max(len(pieces), 2)):
        name = f"{stem}.pieces.{i}.weight"
        if name not in pieces:
            raise BadInputError(
                f"'{stem}.weight' is stored in pieces, of which {name!r} is missing beside {next(iter(pieces))!r}"
            )
        yield pieces[name]


def _of_pieces(name: str, pieces: Sequence[Weight]) -> Weight:
    """Return the weight that pieces make up, whose shapes and formats have to fit together."""
    axis, first = neuron_axis(name), pieces[0].info
    formats = []
    for piece in pieces:
        fmt = piece.stored_as
        if not isinstance(fmt, NumberFormat) or not fmt.cuttable:
            raise BadInputError(
                f"{piece.info.name!r} is {piece.format}; pieces of a weight are of int formats or ternary"
            )
        if piece.info.shape[1 - axis] != first.shape[1 - axis]:
            raise BadInputError(
                f"{piece.info.name!r} is {list(piece.info.shape)} and {first.name!r} is {list(first.shape)}; as "
                f"{AXES[axis]} of {name!r} they need as many {AXES[1 - axis]}"
            )
        formats.append(fmt)
    counts = tuple(piece.info.shape[axis] for piece in pieces)
    shape = (sum(counts), first.shape[1]) if axis == 0 else (first.shape[0], sum(counts))
    members = tuple(member for piece in pieces for member in piece.members)
    return Weight(replace(first, name=name, shape=shape), Pieces(axis, tuple(formats), counts), members)
