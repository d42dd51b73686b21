"""The figures of a profile report.

Backgrounds are transparent, and all text and lines have one mid-grey colour, `INK`: figures are readable on light and
dark pages, and a page that holds them can replace `INK` by its own text colour. Equal reports give equal bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.staging import staged
from ditmoe_cli.routing.report.contents import VARIABLES, BlockReport, ProfileReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

INK = "#7f7f7e"
COLOURS = ("#2a7fd4", "#e0792b", "#2ba36b", "#b05fc4")
DEPTH = ("#1d9da8", "#6a73de", "#cf3fc4")  # from the first block to the last, readable on white and on black
BRANCH_NAMES = ("conditional", "unconditional")
AGREEMENTS = {"step": "with the step before", "branch": "with the other branch", "neighbour": "with the next patch"}
PIXELS_PER_INCH = 150
LARGEST_DEVIATION = 1.0
SMALLEST_DEVIATION = 0.1

_STYLE: Mapping[str, Any] = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "ditmoe",
}


@dataclass(frozen=True)
class Drawing:
    """One figure: its file name without suffix, title, caption, and picture as SVG and PNG."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def require_matplotlib() -> None:
    """Raise `BadInputError` where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise BadInputError("figures need matplotlib, which is not here; install it: pip install 'ditmoe[report]'")


def draw(report: ProfileReport, svg: bool = True, png: bool = False) -> Iterator[Drawing]:
    """Yield the figures of a report as SVG, PNG or both; a format that is not asked for is empty.

    Raises `BadInputError` where matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**matplotlib.rcParamsDefault, **_STYLE}
    style.pop("backend", None)
    with matplotlib.rc_context(style):
        for name, title, caption, paint in _figures(report):
            figure = Figure(layout="constrained")
            paint(figure)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laid out once, so that no format depends on the others
            yield Drawing(name, title, caption, _svg(figure) if svg else "", _png(figure) if png else b"")


Painter = Callable[["Figure"], None]
Planned = tuple[str, str, str, Painter]


def _figures(report: ProfileReport) -> Iterator[Planned]:
    """Yield name, title, caption and painter of each figure that the report has numbers for."""
    yield ("load", "Load", _LOAD, lambda f: _load(f, report))
    if report.evidence.information:
        yield ("information", "Information by block", _INFORMATION, lambda f: _information(f, report))
    if len(report.evidence.concentration) > 1:
        yield ("concentration", "Concentration by step", _CONCENTRATION, lambda f: _concentration(f, report))
    for variable in ("position", "step", "class"):
        for branch in range(report.branches):
            yield (
                f"map-{variable}-{BRANCH_NAMES[branch]}",
                f"Expert by {variable}, {BRANCH_NAMES[branch]} branch",
                _MAP,
                _map_painter(report, variable, branch),
            )
    lifts = [np.where(np.eye(len(b.lift), dtype=bool), np.nan, b.lift - 1.0) for b in report.blocks]
    yield ("coactivation", "Co-activation", _LIFT, lambda f: _matrices(f, lifts, ("expert", "expert"), "lift − 1"))
    for name, title, caption, matrices in _similarities(report):
        yield (name, title, caption, _matrix_painter(matrices, "alignment" if name == "similarity-cka" else "cosine"))
    yield from _transitions(report)
    yield ("saliency", "Saliency", _SALIENCY, lambda f: _saliency(f, report))
    if len(report.evidence.concentration) > 1:
        yield ("router", "Router by step", _ROUTER, lambda f: _router(f, report))


_LOAD = "Load ratio of each expert, less 1 (crosses: dead), and the normalised entropy of each block's load."
_INFORMATION = (
    "Share of the expert choices' entropy that each variable explains, with 95 % intervals; ticks: what chance reaches."
)
_CONCENTRATION = (
    "1 − H(expert) / ln E in each step bin, mean over blocks with its 95 % interval; thin lines: each block."
)
_MAP = (
    "p(expert | x) / p(expert) − 1. All blocks, variables and branches share one scale; values beyond its ends are "
    "cut. Grey: experts never chosen."
)
_LIFT = (
    "How much more often two experts are chosen for the same token than if top-k drew different experts at random; 0 "
    "is chance. Grey: an expert with itself."
)
_MEANS = "Cosine of the experts' mean outputs on the same tokens, routed to them or not."
_GRAM = "Cosine of what two experts add to the residual stream, summed over tokens that chose both."
_CKA = (
    "Centred kernel alignment of the experts' outputs on the same tokens: 1 for outputs equal but for a rotation, a "
    "scale and a constant."
)
_WEIGHTS = (
    "Cosine of the experts' weights after their neurons were matched. Unrelated experts reach more than 0, as the best "
    "matching is taken."
)
_NEXT = "How much more often an expert of one block is followed by an expert of the next than by chance."
_KEPT = (
    "Share of a token's experts that are chosen again: at the next step, by the same token of the other branch, by the "
    "patch to its right or below; dashed: if choices were independent."
)
_SALIENCY = "Each criterion over its mean in the block, less 1: what is orange would be kept first."
_ROUTER = (
    "Entropy of the router's probabilities, margin between the last chosen and the first left out, and top-k mass."
)


def _similarities(report: ProfileReport) -> Iterator[tuple[str, str, str, list[Array]]]:
    """Yield the similarities that are known: none but that of weights in a ``fast`` profile."""
    kinds: dict[str, tuple[str, str, Callable[[BlockReport], Array | None]]] = {
        "similarity": ("Similarity of mean outputs", _MEANS, lambda b: b.mean_similarity),
        "similarity-cka": ("Similarity of outputs", _CKA, lambda b: b.output_cka),
        "similarity-residual": ("Similarity in the residual stream", _GRAM, lambda b: b.gram_similarity),
        "similarity-weights": ("Similarity of weights", _WEIGHTS, lambda b: b.weight_similarity),
    }
    for name, (title, caption, of) in kinds.items():
        matrices = [_off_diagonal(matrix) for matrix in map(of, report.blocks) if matrix is not None]
        if matrices:
            yield (name, title, caption, matrices)


def _off_diagonal(matrix: Array) -> Array:
    return np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)


def _matrix_painter(matrices: list[Array], label: str) -> Painter:
    return lambda figure: _matrices(figure, matrices, ("expert", "expert"), label, limit=1.0)


def _map_painter(report: ProfileReport, variable: str, branch: int) -> Painter:
    maps = [block.maps[variable][branch].T - 1.0 for block in report.blocks]
    limit = shared_limit(report)
    return lambda figure: _matrices(figure, maps, (_AXES[variable], "expert"), "p(e|x) / p(e) − 1", limit)


_AXES = {"position": "position", "step": "step bin", "class": "class"}


def shared_limit(report: ProfileReport) -> float:
    """Return the end of the scale that all heat maps share: the 99.5 % quantile of deviations, within fixed bounds."""
    values = np.concatenate([np.abs(m[np.isfinite(m)] - 1.0) for b in report.blocks for m in b.maps.values()])
    return float(np.clip(np.quantile(values, 0.995) if values.size else 0.0, SMALLEST_DEVIATION, LARGEST_DEVIATION))


def _transitions(report: ProfileReport) -> Iterator[Planned]:
    moves = [block.next_block - 1.0 for block in report.blocks if block.next_block is not None]
    if moves:
        titles = [f"block {i} to {i + 1}" for i in range(len(moves))]
        yield (
            "transitions",
            "Transitions between blocks",
            _NEXT,
            lambda f: _matrices(f, moves, ("expert above", "expert"), "lift − 1", titles=titles),
        )
    names = agreements(report)
    if names:
        yield ("agreement", "Choices kept", _KEPT, lambda f: _kept(f, report, names))


def agreements(report: ProfileReport) -> list[str]:
    """Return the pairings, names in `AGREEMENTS`, that every block has counts for."""
    return [name for name in AGREEMENTS if all(name in block.agreement for block in report.blocks)]


# painters


def _diverging() -> Any:
    """Return a colour map whose middle is transparent, so that the page shows where nothing deviates."""
    from matplotlib.colors import LinearSegmentedColormap

    ends = ((0.16, 0.49, 0.89), (0.92, 0.46, 0.12))
    stops = [(*ends[0], 1.0), (*ends[0], 0.0), (*ends[1], 0.0), (*ends[1], 1.0)]
    points = [0.0, 0.5, 0.5, 1.0]
    colours = LinearSegmentedColormap.from_list("deviation", list(zip(points, stops, strict=True)), N=255)
    return colours.with_extremes(bad=(0.5, 0.5, 0.5, 0.35))


def _matrices(
    figure: Figure,
    matrices: Sequence[Array],
    axes: tuple[str, str],
    label: str,
    limit: float | None = None,
    titles: Sequence[str] | None = None,
) -> None:
    """Paint one panel per block, all on one symmetric scale."""
    if limit is None:
        known = np.concatenate([np.abs(m[np.isfinite(m)]) for m in matrices])
        limit = float(np.clip(known.max() if known.size else 0.0, SMALLEST_DEVIATION, LARGEST_DEVIATION))
    columns = _columns(len(matrices), max(m.shape[1] for m in matrices))
    rows = -(-len(matrices) // columns)
    width = 9.6
    height = min(max(max(m.shape[0] for m in matrices) * 0.07 + 0.55, 1.25), 3.2)
    figure.set_size_inches(width, height * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for i, (panel, matrix) in enumerate(zip(panels.flat, matrices, strict=False)):
        panel.set_axis_on()
        image = _image(panel, matrix, limit)
        panel.set_title(titles[i] if titles else f"block {i}")
        panel.set_xlabel(axes[0] if i >= len(matrices) - columns else "")
        panel.set_ylabel(axes[1] if i % columns == 0 else "")
    size = min(1.0, 2.4 / (height * rows))
    cut = any(bool((m[np.isfinite(m)] > limit).any()) for m in matrices)
    extend = "max" if cut else "neither"
    bar = figure.colorbar(image, ax=panels, shrink=size, anchor=(0.0, 1.0), pad=0.01, extend=extend)
    bar.set_label(label)
    bar.outline.set_linewidth(0.6)


def _columns(panels: int, width: int) -> int:
    """Return how many panels stand side by side: the fewer, the wider they are, unless there are many."""
    most = 2 if width > 100 and panels <= 8 else 4 if width > 8 else 6
    return min(panels, most)


def _image(panel: Any, matrix: Array, limit: float) -> Any:
    from matplotlib.ticker import MaxNLocator

    image = panel.imshow(
        np.ma.masked_invalid(matrix),
        cmap=_diverging(),
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        interpolation="none",
    )
    for axis, size in ((panel.xaxis, matrix.shape[1]), (panel.yaxis, matrix.shape[0])):
        axis.set_major_locator(MaxNLocator(nbins=min(size, 6), integer=True, min_n_ticks=1))
    return image


def _lines(panel: Any, xlabel: str, ylabel: str, points: int) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel(xlabel)
    panel.set_ylabel(ylabel)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=min(points, 12), integer=True, min_n_ticks=1))
    panel.grid(alpha=0.2, linewidth=0.5)


def _table_of(values: Sequence[Array]) -> Array:
    """Return values per block (E,) as one table (E, L), NaN where a block has fewer experts."""
    table = np.full((max(map(len, values)), len(values)), np.nan)
    for block, column in enumerate(values):
        table[: len(column), block] = column
    return table


def _load(figure: Figure, report: ProfileReport) -> None:
    table = _table_of([block.load for block in report.blocks]) - 1.0
    figure.set_size_inches(9.6, min(max(1.6 + 0.12 * len(table), 2.4), 6.0))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    known = np.abs(table[np.isfinite(table)])
    image = _image(left, table, float(np.clip(known.max(), SMALLEST_DEVIATION, LARGEST_DEVIATION)))
    left.set_xlabel("block")
    left.set_ylabel("expert")
    dead = np.array(report.dead).reshape(-1, 2)
    left.scatter(dead[:, 0], dead[:, 1], marker="x", color=INK, s=18, linewidths=0.8)
    figure.colorbar(image, ax=left, label="load ratio − 1", extend="max")
    entropy = [block.entropy for block in report.blocks]
    right.plot(entropy, color=COLOURS[0], marker="o", markersize=3, linewidth=1)
    right.set_ylim(min(0.9, min(entropy) - 0.02), 1.005)
    _lines(right, "block", "normalised entropy of load", len(entropy))


def _information(figure: Figure, report: ProfileReport) -> None:
    names = [name for name in VARIABLES if name in report.blocks[0].information]
    figure.set_size_inches(9.6, 2.6)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name, colour in zip(panels, names, COLOURS, strict=False):
        estimates = [block.information[name] for block in report.blocks]
        x = np.arange(len(estimates))
        value = np.array([e.corrected for e in estimates])
        ends = np.array([[e.low for e in estimates], [e.high for e in estimates]])
        spread = np.abs(ends - value)
        panel.errorbar(x, value, spread, color=colour, fmt="o-", markersize=3, linewidth=1, capsize=2)
        panel.scatter(x, [e.null_high for e in estimates], marker="_", color=INK, s=40, linewidths=1)
        panel.set_title(name)
        panel.set_ylim(0, max(1.15 * max(ends[1].max(), max(e.null_high for e in estimates)), 0.01))
        _lines(panel, "block", "I(x; expert) / H(expert)" if name == names[0] else "", len(x))


def _concentration(figure: Figure, report: ProfileReport) -> None:
    figure.set_size_inches(9.6, 2.8)
    panel = figure.subplots()
    bins = report.evidence.concentration
    x = np.arange(len(bins))
    _by_depth(figure, panel, [block.concentration for block in report.blocks])
    low, high = [b.low for b in bins], [b.high for b in bins]
    panel.fill_between(x, low, high, color=COLOURS[1], alpha=0.3, linewidth=0)
    panel.plot(x, [b.value for b in bins], color=COLOURS[1], linewidth=2)
    panel.set_ylim(bottom=0)
    _lines(panel, "step bin (0: noise)", "1 − H / ln E", len(x))


def _by_depth(figure: Figure, panel: Any, curves: Sequence[Array], legend: bool = True, style: str = "-") -> None:
    """Plot a line per block, coloured by depth."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    scale = Normalize(0, max(len(curves) - 1, 1))
    colours = LinearSegmentedColormap.from_list("depth", DEPTH)
    for i, curve in enumerate(curves):
        alone = "." if np.isfinite(curve).sum() == 1 else ""
        panel.plot(curve, color=colours(scale(i)), linewidth=0.9, alpha=0.8, linestyle=style, marker=alone)
    if legend and len(curves) > 1:
        bar = figure.colorbar(ScalarMappable(scale, colours), ax=panel, pad=0.01, label="block")
        bar.locator = _whole(len(curves))
        bar.update_ticks()


def _whole(size: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=min(size, 6), integer=True, min_n_ticks=1)


def _kept(figure: Figure, report: ProfileReport, names: Sequence[str]) -> None:
    figure.set_size_inches(9.6, 2.6)
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for panel, name in zip(panels, names, strict=True):
        agreed = [block.agreement[name] for block in report.blocks]
        _by_depth(figure, panel, [np.where(a.chance > 0, a.kept, np.nan) for a in agreed], legend=name == names[-1])
        _by_depth(figure, panel, [np.where(a.chance > 0, a.chance, np.nan) for a in agreed], legend=False, style="--")
        panel.set_ylim(0, 1.02)
        panel.set_title(AGREEMENTS[name])
        _lines(panel, "step bin (0: noise)", "share of experts" if name == names[0] else "", len(agreed[0].kept))


def _saliency(figure: Figure, report: ProfileReport) -> None:
    names = list(report.blocks[0].saliency)
    experts = max(len(block.load) for block in report.blocks)
    figure.set_size_inches(9.6, min(max(1.0 + 0.08 * experts, 1.6), 4.0) * 2)
    panels = figure.subplots(2, 3)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(panels.flat, names, strict=False):
        relative = [b.saliency[name] / max(float(b.saliency[name].mean()), 1e-300) - 1.0 for b in report.blocks]
        image = _image(panel, _table_of(relative), LARGEST_DEVIATION)
        panel.set_title(name)
        panel.set_xlabel("block")
        panel.set_ylabel("expert")
    figure.colorbar(image, ax=panels, shrink=0.6, pad=0.01, extend="max", label="over the block's mean, less 1")


def _router(figure: Figure, report: ProfileReport) -> None:
    figure.set_size_inches(9.6, 2.6)
    panels = figure.subplots(1, 3)
    titles = {"entropy": "entropy in nats", "margin": "margin", "topk_mass": "top-k mass"}
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        _by_depth(figure, panel, [block.router[name] for block in report.blocks], legend=name == "topk_mass")
        panel.set_title(title)
        _lines(panel, "step bin (0: noise)", "", len(report.blocks[0].router[name]))


# bytes


def _svg(figure: Figure) -> str:
    """Return a figure as an SVG element for use inside HTML: no prologue, no metadata, no reference to anywhere."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    return re.sub(r'<g id="[a-zA-Z0-9.]+_\d+">', "<g>", text)


def _png(figure: Figure) -> bytes:
    """Return a figure as PNG with a transparent background."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PIXELS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def write_figures(drawings: Sequence[Drawing], folder: Path, replace: bool) -> None:
    """Write PNG files into a new `folder`, or `replace` all figures of an old one.

    A new folder appears whole or not at all. In an old one each file is replaced whole, and stale figures are deleted.
    """
    if not replace:
        with staged(folder) as staging:
            staging.mkdir()
            for drawing in drawings:
                (staging / f"{drawing.name}.png").write_bytes(drawing.png)
        return
    names = {f"{drawing.name}.png" for drawing in drawings}
    for drawing in drawings:
        with staged(folder / f"{drawing.name}.png", force=True) as staging:
            staging.write_bytes(drawing.png)
    for stale in sorted(file for file in folder.iterdir() if file.name not in names):
        stale.unlink()
