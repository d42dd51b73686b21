"""The figures of a profile report: which ones it has numbers for, and what stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from math import isqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.progress import phase
from ditmoe_cli.routing.report import captions, painters
from ditmoe_cli.routing.report.contents import Array, BlockReport, ProfileReport
from ditmoe_cli.routing.report.marks import description, printable
from ditmoe_cli.routing.report.painters import AGREEMENTS, LARGEST_DEVIATION, Scale
from ditmoe_cli.routing.report.pictures import Drawing, png_of, svg_of
from ditmoe_cli.routing.sensitivity.sensitivity_map import SensitivityMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BRANCH_NAMES = ("conditional", "unconditional")
_AXES = {"position": "position", "step": "step bin", "class": "class"}
SENSITIVITY = "Error without a part of a block"
_MAP_QUANTILE = 0.995


class Planned(NamedTuple):
    """A figure before it is painted."""

    name: str
    title: str
    caption: str
    paint: Callable[[Figure], None]


def require_matplotlib() -> None:
    """Raise `BadInputError` where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise BadInputError("figures need matplotlib, which is not here; install it: pip install 'ditmoe[report]'")


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the style of reports, whatever the user's settings. Raises `BadInputError` without matplotlib."""
    require_matplotlib()
    import matplotlib

    style: Any = {**matplotlib.rcParamsDefault, **painters.STYLE}
    style.pop("backend", None)
    with matplotlib.rc_context(style):
        yield


def draw(report: ProfileReport, svg: bool = True, png: bool = False, request: str = "") -> Iterator[Drawing]:
    """Yield the figures of a report as SVG, PNG or both; a format that is not asked for is empty.

    A PNG has its title and the profile's name in it, and says which `request` it was made of. Equal reports give equal
    bytes. Raises `BadInputError` where matplotlib is not installed.
    """
    figures = tuple(planned(report))
    about = description(request, [figure.name for figure in figures])
    with styled(), phase("drawing", len(figures), "figures") as advance:
        for figure in figures:
            heading = f"{figure.title}: {report.name}"
            yield Drawing(
                figure.name,
                figure.title,
                figure.caption,
                svg_of(_painted(figure)) if svg else "",
                png_of(_painted(figure, heading), about) if png else b"",
            )
            advance(1)


def sensitivity_png(found: SensitivityMap, name: str) -> bytes:
    """Return a map of sensitivity as PNG with the `name` of its checkpoint. Raises `BadInputError` as `draw`."""
    with styled(), phase("drawing"):
        return png_of(_painted(_sensitivity(found), f"{SENSITIVITY}: {printable(name)}"))


def _sensitivity(found: SensitivityMap) -> Planned:
    return Planned("sensitivity", SENSITIVITY, captions.SENSITIVITY, lambda f: painters.sensitivity(f, found))


def _painted(planned: Planned, heading: str = "") -> Figure:
    """Return a figure, laid out, with a `heading` above where there is one."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    planned.paint(figure)
    if heading:
        figure.suptitle(heading, fontsize=9, parse_math=False)
    return figure


def planned(report: ProfileReport) -> Iterator[Planned]:
    """Yield the figures that the report has numbers for."""
    yield Planned("load", "Load", captions.load(report), lambda f: painters.load(f, report))
    if report.evidence.information:
        yield Planned(
            "information", "Information by block", captions.INFORMATION, lambda f: painters.information(f, report)
        )
    if len(report.evidence.concentration) > 1:
        text = captions.concentration(report)
        yield Planned("concentration", "Concentration by step", text, lambda f: painters.concentration(f, report))
    yield from _maps(report)
    yield from _pairs(report)
    yield from _transitions(report)
    yield Planned("saliency", "Saliency", captions.saliency(report), lambda f: painters.saliency(f, report))
    if len(report.evidence.concentration) > 1:
        yield Planned("router", "Router by step", captions.ROUTER, lambda f: painters.router(f, report))
    if report.sensitivity is not None:
        yield _sensitivity(report.sensitivity)


def _maps(report: ProfileReport) -> Iterator[Planned]:
    """Yield the maps of each variable that takes two values or more, in each branch, all on one scale."""
    variables = mapped(report)
    limit = shared_limit(report)
    for variable in variables:
        for branch in range(report.branches):
            tables = [block.maps[variable][branch].T - 1.0 for block in report.blocks]
            of_branch = BRANCH_NAMES[branch] if report.branches > 1 else ""
            patches = variable == "position" and isqrt(tables[0].shape[1]) ** 2 == tables[0].shape[1]
            yield Planned(
                "-".join(filter(None, ("map", variable, of_branch))),
                f"Expert by {variable}" + (f", {of_branch} branch" if of_branch else ""),
                captions.maps(report, tables, limit, variables, patches),
                _map_painter(tables, variable, limit, patches),
            )


def _map_painter(tables: list[Array], variable: str, limit: float, patches: bool) -> Callable[[Figure], None]:
    scale = Scale("p(e|x) / p(e) − 1", limit)
    if patches:
        return lambda figure: painters.patch_maps(figure, tables, scale)
    return lambda figure: painters.matrices(figure, tables, (_AXES[variable], "expert"), scale)


def mapped(report: ProfileReport) -> list[str]:
    """Return the variables that take two values or more."""
    return [variable for variable in _AXES if report.blocks[0].maps[variable].shape[1] > 1]


def shared_limit(report: ProfileReport) -> float:
    """Return the end of the scale that all heat maps share: the 99.5 % quantile of deviations, within fixed bounds."""
    return painters.limit_of([m.ravel() - 1.0 for b in report.blocks for m in b.maps.values()], _MAP_QUANTILE)


def _pairs(report: ProfileReport) -> Iterator[Planned]:
    """Yield the figures of pairs of a block's experts, where there are pairs."""
    lifts = [_off_diagonal(block.lift) for block in report.blocks]
    if any((lift[np.isfinite(lift)] > 0).any() for lift in lifts):  # none where one expert is chosen a token
        deviations = [lift - 1.0 for lift in lifts]
        scale = Scale("lift − 1", painters.limit_of(deviations))
        yield Planned("coactivation", "Co-activation", captions.LIFT, _pair_painter(deviations, scale))
    for name, title, caption, tables in _similarities(report):
        label = "alignment" if name == "similarity-cka" else "cosine"
        yield Planned(name, title, caption, _pair_painter(tables, Scale(label, LARGEST_DEVIATION)))


def _pair_painter(tables: list[Array], scale: Scale) -> Callable[[Figure], None]:
    return lambda figure: painters.matrices(figure, tables, ("expert", "expert"), scale)


def _similarities(report: ProfileReport) -> Iterator[tuple[str, str, str, list[Array]]]:
    """Yield the similarities that are known: none but that of weights in a ``fast`` profile."""
    kinds: dict[str, tuple[str, str, Callable[[BlockReport], Array | None]]] = {
        "similarity": ("Similarity of mean outputs", captions.MEANS, lambda b: b.mean_similarity),
        "similarity-cka": ("Similarity of outputs", captions.CKA, lambda b: b.output_cka),
        "similarity-residual": ("Similarity in the residual stream", captions.GRAM, lambda b: b.gram_similarity),
        "similarity-weights": ("Similarity of weights", captions.WEIGHTS, lambda b: b.weight_similarity),
    }
    for name, (title, caption, of) in kinds.items():
        tables = [_off_diagonal(matrix) for matrix in map(of, report.blocks) if matrix is not None]
        if any(len(table) > 1 for table in tables):
            yield (name, title, caption, tables)


def _off_diagonal(matrix: Array) -> Array:
    return np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)


def _transitions(report: ProfileReport) -> Iterator[Planned]:
    moves = [block.next_block - 1.0 for block in report.blocks if block.next_block is not None]
    if moves:
        scale, titles = (
            Scale("lift − 1", painters.limit_of(moves)),
            [f"block {i} to {i + 1}" for i in range(len(moves))],
        )
        yield Planned(
            "transitions",
            "Transitions between blocks",
            captions.NEXT,
            lambda f: painters.matrices(f, moves, ("expert above", "expert"), scale, titles),
        )
    names = agreements(report)
    if names:
        yield Planned("agreement", "Choices kept", captions.kept(names), lambda f: painters.kept(f, report, names))


def agreements(report: ProfileReport) -> list[str]:
    """Return the pairings, names in `AGREEMENTS`, that every block has counts for."""
    return [name for name in AGREEMENTS if all(name in block.agreement for block in report.blocks)]
