"""Number formats by name: all that there are, what their names mean, and what is done with a format's name at hand.

A new format is entered into `_formats`, and, if files can hold it, into `FAMILIES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.base import Grid, NumberFormat, StoredFormat
from ditmoe_cli.formats.bitsandbytes import FourBit, Int8, fits_bitsandbytes
from ditmoe_cli.formats.differences import SvdDifference, TernaryDifference
from ditmoe_cli.formats.grouped import GROUPS
from ditmoe_cli.formats.integer import BITS, Integer
from ditmoe_cli.formats.pieces import AXES, Pieces
from ditmoe_cli.formats.ternary import Ternary

if TYPE_CHECKING:
    from torch import Tensor

Format = str  # the name of a number format, as plans hold it: one of `FORMATS`, or of pieces of them
# in the order in which they are asked whether a stored tensor is theirs
FAMILIES: tuple[type[StoredFormat], ...] = (FourBit, Int8, SvdDifference, TernaryDifference, Ternary, Integer)
_PIECE = re.compile(r"([a-z0-9-]+)\*([1-9][0-9]{0,8})")


def _formats() -> Iterator[NumberFormat]:
    for double in (False, True):
        yield FourBit("nf4", double)
        yield FourBit("fp4", double)
    yield Int8()
    for group in GROUPS:
        for bits in BITS:
            yield Integer(group, bits)
            yield Integer(group, bits, symmetric=True)
        yield Ternary(group)


_BY_NAME: Mapping[Format, NumberFormat] = {fmt.name: fmt for fmt in _formats()}
FORMATS: tuple[Format, ...] = tuple(_BY_NAME)


def parse_format(name: object, what: str = "the format") -> NumberFormat:
    """Return the format of a name, of pieces or not. Raises `BadInputError` that begins with `what` for other names."""
    if isinstance(name, str) and ":" in name:
        pieces = parse_pieces(name)
        if pieces is None:
            raise BadInputError(
                f"{what} is {name!r}; expected two or more pieces of int and ternary formats with their rows or "
                "columns, as rows:int4-g64*64+int2-g64*192"
            )
        return pieces
    fmt = _BY_NAME.get(name) if isinstance(name, str) else None
    if fmt is None:
        raise BadInputError(
            f"{what} is {name!r}; expected one of nf4, int8, fp4, nf4-dq, fp4-dq, int{{b}}-g{{g}}, int{{b}}-g{{g}}-sym "
            f"or ternary-g{{g}} with b one of {', '.join(map(str, BITS))} and g one of {', '.join(map(str, GROUPS))}"
        )
    return fmt


@lru_cache(maxsize=1024)
def parse_pieces(name: Format) -> Pieces | None:
    """Return the format of pieces that a name means; None for all other names."""
    axis, _, listed = name.partition(":")
    matches = [_PIECE.fullmatch(piece) for piece in listed.split("+")]
    if axis not in AXES or len(matches) < 2:
        return None
    formats = [_BY_NAME.get(match[1]) if match else None for match in matches]
    cuttable = tuple(fmt for fmt in formats if fmt is not None and fmt.cuttable)
    if len(cuttable) < len(formats):
        return None
    return Pieces(AXES.index(axis), cuttable, tuple(int(match[2]) for match in matches if match))


def format_label(name: str) -> str:
    """Return a format's name without the sizes of its pieces, by which weights may be counted."""
    pieces = parse_pieces(name)
    return name if pieces is None else pieces.label


def is_quantizable(info: TensorInfo, fmt: Format | None = None) -> bool:
    """Return whether a weight can be stored in format `fmt`, or in those of bitsandbytes where none is given.

    Those take a floating matrix of even size; integer and ternary formats any floating matrix of at least 8 columns.
    Pieces take one whose rows or columns, along the axis of its neurons, they add up to.
    """
    return fits_bitsandbytes(info) if fmt is None else parse_format(fmt).accepts(info)


def quantized_members(info: TensorInfo, fmt: Format) -> list[TensorInfo]:
    """Return the tensors that store the weight `info` in format `fmt`."""
    return list(parse_format(fmt).members(info).values())


def grid_of(weight: Tensor, fmt: Format, importance: Tensor | None = None, *, name: str = "weight") -> Grid:
    """Return the grid on which to round a weight (out, in); see `NumberFormat.grid` for the arguments and errors."""
    return parse_format(fmt).grid(weight, importance, name=name)


def pack(weight: Tensor, info: TensorInfo, fmt: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Quantise a weight (out, in); return the `quantized_members` by name. Raises `BadInputError` as `grid_of` does."""
    return parse_format(fmt).pack(weight, info, importance)
