"""What an expert may become: a width, and a format for each of its matrices at that width. Torch-free.

Structure and rounding are taken to add up: with a the amplification of the block's mixture, S the refitted error of a
width (`compression.replay.eliminations`), G its growth and Q the errors of formats on the whole expert,

    error(w, f_gate, f_up, f_down) = a (κ S(w) + G(w) Σ_m Q_m(f_m)).

κ weighs structure against bits: refits share errors among experts, and GPTQ rounds better than to the nearest, neither
of which S and Q know. Experts that are tied are one decision: their bytes and errors add up. Matrices that are tied
take one format. Where none of the formats offered suits a width, matrices of that width keep their dtype, as
`quantize` leaves them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ditmoe_cli.compression.precision.lagrange import Group, Option, undominated
from ditmoe_cli.compression.precision.mix import UNTOUCHED
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.names import MATRICES
from ditmoe_cli.formats.registry import is_quantizable, quantized_members

MOST_WIDTHS = 24  # that an expert may choose from, all multiples of a number and its own


@dataclass(frozen=True)
class WidthCurve:
    """An expert's widths, ascending, the refitted error of each, and the growth of errors of formats there."""

    widths: tuple[int, ...]
    errors: tuple[float, ...]
    growth: tuple[float, ...]

    @property
    def without_zero(self) -> WidthCurve:
        """The curve of an expert that has to stay."""
        start = 1 if self.widths[0] == 0 else 0
        return WidthCurve(self.widths[start:], self.errors[start:], self.growth[start:])


@dataclass(frozen=True)
class ExpertOffer:
    """What is offered to one expert.

    Attributes:
        stem: its full name, as ``blocks.3.moe.experts.1``.
        infos: its matrices gate, up and down at full width.
        curve: its widths.
        formats: of each matrix, the error of each format on the whole expert; None, without error, leaves it as it is.
    """

    stem: str
    infos: tuple[TensorInfo, ...]
    curve: WidthCurve
    formats: tuple[Mapping[str | None, float], ...]


@dataclass(frozen=True)
class Pick:
    """A width, and a format for gate, up and down."""

    width: int
    formats: tuple[str | None, ...]


@dataclass(frozen=True)
class _Point:
    bytes: int
    error: float
    formats: tuple[str | None, ...]


@dataclass(frozen=True)
class ExpertDecision:
    """One decision for one or several experts, which have the same widths to choose from.

    Attributes:
        name: of the decision.
        block: its block.
        offers: the experts.
        tied: which of their matrices take one format, as indices.
        takes: returns whether a matrix may be stored in a format.
    """

    name: str
    block: int
    offers: tuple[ExpertOffer, ...]
    tied: tuple[int, ...] = ()
    takes: Callable[[TensorInfo, str], bool] = is_quantizable

    @cached_property
    def _fronts(self) -> tuple[tuple[_Point, ...], ...]:
        """Of each width, the formats worth taking, with their errors on whole experts times the growth."""
        return tuple(self._front(place) for place in range(len(self.offers[0].curve.widths)))

    def _front(self, place: int) -> tuple[_Point, ...]:
        width = self.offers[0].curve.widths[place]
        if width == 0:
            return (_Point(0, 0.0, (None,) * len(MATRICES)),)
        front: tuple[_Point, ...] = (_Point(0, 0.0, ()),)
        for unit in self._units:
            front = worthwhile(
                _Point(known.bytes + more.bytes, known.error + more.error, known.formats + more.formats)
                for known, more in itertools.product(front, self._of_unit(unit, place, width))
            )
        order = [matrix for unit in self._units for matrix in unit]
        by_matrix = [order.index(matrix) for matrix in range(len(order))]
        return tuple(replace(point, formats=tuple(point.formats[place] for place in by_matrix)) for point in front)

    @cached_property
    def _units(self) -> tuple[tuple[int, ...], ...]:
        """The matrices that take one format together: those that are tied, and each other one alone."""
        alone = tuple((matrix,) for matrix in range(len(MATRICES)) if matrix not in self.tied)
        return (self.tied, *alone) if self.tied else alone

    def _of_unit(self, unit: Sequence[int], place: int, width: int) -> list[_Point]:
        """Return the formats that suit all matrices of a unit at a width; their own dtype alone where none does."""
        members = [(offer, matrix) for offer in self.offers for matrix in unit]
        infos = [narrowed_info(o.infos[matrix], width, len(o.infos) - 1 == matrix) for o, matrix in members]
        points = []
        for fmt in self.offers[0].formats[unit[0]]:
            offered = all(fmt in offer.formats[matrix] for offer, matrix in members)
            if offered and (fmt is None or all(self.takes(info, fmt) for info in infos)):
                sizes = sum(bytes_of_weight(info.shape, info.dtype, fmt) for info in infos)
                errors = sum(offer.formats[matrix][fmt] * offer.curve.growth[place] for offer, matrix in members)
                points.append(_Point(sizes, errors, (fmt,) * len(unit)))
        if points:
            return points
        return [_Point(sum(info.nbytes for info in infos), 0.0, (None,) * len(unit))]

    def group(self, amplification: float, kappa: float, width: int | None = None) -> tuple[Group, tuple[Pick, ...]]:
        """Return the decision as a group of the program, and what each of its options is; of one `width` if given."""
        found: list[tuple[Option, Pick]] = []
        for place, front in enumerate(self._fronts):
            structure = kappa * sum(offer.curve.errors[place] for offer in self.offers)
            own = self.offers[0].curve.widths[place]
            for point in front if width in (None, own) else ():
                pick = Pick(own, point.formats)
                found.append((Option(_label(pick), point.bytes, amplification * (structure + point.error)), pick))
        kept = undominated(Group(self.name, tuple(option for option, _ in found)))
        return Group(self.name, tuple(found[o][0] for o in kept)), tuple(found[o][1] for o in kept)


def worthwhile(points: Iterable[_Point]) -> tuple[_Point, ...]:
    """Return the points that no other one beats in bytes and error, by rising bytes; of equal ones the first."""
    kept: list[_Point] = []
    for point in sorted(points, key=lambda point: (point.bytes, point.error)):
        if not kept or point.error < kept[-1].error:
            kept.append(point)
    return tuple(kept)


def _label(pick: Pick) -> str:
    return " ".join([str(pick.width), *(fmt or UNTOUCHED for fmt in pick.formats)])


def narrowed_info(info: TensorInfo, width: int, is_down: bool) -> TensorInfo:
    """Return a matrix of an expert with `width` neurons: rows of gate and up, columns of down."""
    out, columns = info.shape
    return TensorInfo(info.name, info.dtype, (out, width) if is_down else (width, columns))


@lru_cache(maxsize=4096)
def bytes_of_weight(shape: tuple[int, ...], dtype: str, fmt: str | None) -> int:
    """Return the bytes of a weight's tensors in a format; None is that of its dtype."""
    info = TensorInfo("weight", dtype, shape)
    return info.nbytes if fmt is None else sum(member.nbytes for member in quantized_members(info, fmt))


def ladder(width: int, multiple: int, *, may_go: bool) -> tuple[int, ...]:
    """Return the widths to choose from: at most about `MOST_WIDTHS`, multiples of `multiple`, and the own one.

    With `may_go` 0 is among them.
    """
    step = multiple * max(1, math.ceil(width / (multiple * MOST_WIDTHS)))
    inner = range(step, width, step)
    finer = [multiple] if step > multiple and multiple < width else []
    return (*((0,) if may_go else ()), *finer, *inner, width)


def default_multiple(width: int) -> int:
    """Return what widths are multiples of: 64, or the largest power of two up to a sixteenth of a small expert."""
    return max(1, min(64, 1 << max(0, (width // 16).bit_length() - 1)))


def picked(decisions: Sequence[ExpertDecision], picks: Sequence[Pick]) -> tuple[dict[str, int], dict[str, str]]:
    """Return the width of each expert, and the format of each matrix that gets one, both by full names."""
    widths: dict[str, int] = {}
    formats: dict[str, str] = {}
    for decision, pick in zip(decisions, picks, strict=True):
        for offer in decision.offers:
            widths[offer.stem] = pick.width
            for info, fmt in zip(offer.infos, pick.formats, strict=True):
                if fmt is not None and pick.width:
                    formats[info.name] = fmt
    return widths, formats
