"""What figures of a report show, painted with matplotlib.

Backgrounds are transparent, and all text and lines have one mid-grey colour, `INK`: figures are readable on light and
dark pages, and a page that holds them can replace `INK` by its own text colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ditmoe_cli.routing.report.claims import VARIABLES
from ditmoe_cli.routing.report.contents import Array, ProfileReport
from ditmoe_cli.routing.report.pictures import INK
from ditmoe_cli.routing.sensitivity.sensitivity_map import PARTS, SensitivityMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#2a7fd4", "#e0792b", "#2ba36b", "#b05fc4")
DEPTH = ("#1d9da8", "#6a73de", "#cf3fc4")  # from the first block to the last, readable on white and on black
LARGEST_DEVIATION = 1.0
SMALLEST_DEVIATION = 0.1
LEVELS = 65  # of the scale of deviations; odd, so that one of them is the transparent middle
DECADES = 1e4  # from the smallest to the largest error of a logarithmic scale
WIDTH = 9.6  # of a figure, in inches
AGREEMENTS = {"step": "with the step before", "branch": "with the other branch", "neighbour": "with the next patch"}

STYLE: Mapping[str, Any] = {
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


class Scale(NamedTuple):
    """A colour scale from -limit to limit, and what it measures."""

    label: str
    limit: float


def limit_of(values: Sequence[Array], quantile: float = 1.0) -> float:
    """Return the end of a symmetric scale for `values`: a quantile of their sizes, within fixed bounds."""
    known = np.concatenate([np.abs(v[np.isfinite(v)]) for v in values])
    end = float(np.quantile(known, quantile)) if known.size else 0.0
    return float(np.clip(end, SMALLEST_DEVIATION, LARGEST_DEVIATION))


def is_cut(values: Sequence[Array], limit: float) -> bool:
    """Return whether a scale of deviations that ends at `limit` cuts any of `values`; none lies below -1."""
    return any(bool((v[np.isfinite(v)] > limit).any()) for v in values)


def has_gaps(values: Sequence[Array]) -> bool:
    """Return whether any of `values` is unknown, which is painted grey."""
    return any(not np.isfinite(v).all() for v in values)


def table_of(values: Sequence[Array]) -> Array:
    """Return values per block (E,) as one table (E, L), NaN where a block has fewer experts."""
    table = np.full((max(map(len, values)), len(values)), np.nan)
    for block, column in enumerate(values):
        table[: len(column), block] = column
    return table


def matrices(
    figure: Figure, tables: Sequence[Array], axes: tuple[str, str], scale: Scale, titles: Sequence[str] | None = None
) -> None:
    """Paint one panel per block, all on one symmetric scale; inner panels of equal size share the outer ones' ticks."""
    columns = _columns(len(tables), max(m.shape[1] for m in tables))
    rows = -(-len(tables) // columns)
    height = min(max(max(m.shape[0] for m in tables) * 0.07 + 0.55, 1.25), 3.2)
    figure.set_size_inches(WIDTH, height * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(tables) :]:
        panel.set_axis_off()
    alike = len({m.shape for m in tables}) == 1
    for i, (panel, table) in enumerate(zip(panels.flat, tables, strict=False)):
        is_left, is_lowest = i % columns == 0, i >= len(tables) - columns
        image = _image(panel, table, scale.limit)
        panel.set_title(titles[i] if titles else f"block {i}")
        panel.set_xlabel(axes[0] if is_lowest else "")
        panel.set_ylabel(axes[1] if is_left else "")
        if alike and not is_left:
            panel.set_yticks([])
        if alike and not is_lowest:
            panel.set_xticks([])
    size = min(1.0, 2.4 / (height * rows))
    _colour_bar(figure, image, panels, scale, is_cut(tables, scale.limit), size)


def _columns(panels: int, width: int) -> int:
    """Return how many panels stand side by side: the fewer, the wider they are, unless there are many."""
    most = 8 if panels > 24 else 6 if panels > 12 or width <= 8 else 2 if width > 100 and panels <= 8 else 4
    return min(panels, most)


def _colour_bar(figure: Figure, image: Any, panels: Any, scale: Scale, cut: bool, size: float = 1.0) -> None:
    extend = "max" if cut else "neither"
    bar = figure.colorbar(image, ax=panels, shrink=size, anchor=(0.0, 1.0), pad=0.01, extend=extend, label=scale.label)
    bar.outline.set_linewidth(0.6)


class Tiling(NamedTuple):
    """How many pixels of a mosaic show a patch, along each side, and how many stand between two maps."""

    side: int
    zoom: int
    gap: int

    @classmethod
    def of(cls, patches: int) -> Tiling:
        """Return the tiling of square maps of so many patches: few pixels, and a gap of about an eighth of a map."""
        side = round(patches**0.5)
        zoom = -(-8 // side)
        return cls(side, zoom, max(side * zoom // 8, 1))

    @property
    def pitch(self) -> int:
        """Return the pixels from one map to the next."""
        return self.side * self.zoom + self.gap

    def middle(self, cell: int) -> float:
        """Return where the middle of a map is drawn."""
        return cell * self.pitch + self.side * self.zoom / 2 - 0.5

    def border(self, cell: float) -> float:
        """Return where the middle of the gap before a map is drawn."""
        return cell * self.pitch - self.gap / 2 - 0.5


def patch_maps(figure: Figure, maps: Sequence[Array], scale: Scale) -> None:
    """Paint a map of the image's patches for each block and expert, from tables (E, P) where P is a square.

    A row of maps belongs to a block, a column to an expert; many blocks stand in several columns of rows.
    """
    experts, tiling = max(len(table) for table in maps), Tiling.of(maps[0].shape[1])
    columns, inches = patch_grid(len(maps), experts)
    rows = -(-len(maps) // columns)
    figure.set_size_inches(WIDTH, max(rows * inches + 0.8, 1.6))
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for i, panel in enumerate(panels):
        part = maps[i * rows : (i + 1) * rows]
        image = _image(panel, mosaic(part, experts, rows), scale.limit, aspect="equal")
        _frame(panel, [len(table) for table in part], tiling)
        across, down = int(0.25 / inches) + 1, int(0.16 / inches) + 1
        _name_maps(panel.xaxis, range(0, experts, across), 0, tiling)
        _name_maps(panel.yaxis, range(0, len(part), down), i * rows, tiling)
        panel.spines[:].set_visible(False)
        panel.set_xlabel("expert")
        panel.set_ylabel("block" if i == 0 else "")
    size = min(1.0, 2.4 / (rows * inches))
    _colour_bar(figure, image, panels, scale, is_cut(maps, scale.limit), size)


def patch_grid(blocks: int, experts: int) -> tuple[int, float]:
    """Return in how many columns blocks stand, and the side of an expert's map in inches: as large as fits a screen."""

    def side(columns: int) -> float:
        return min(0.9, ((WIDTH - 0.9) / columns - 0.35) / experts, 7.0 / -(-blocks // columns))

    columns = max(range(1, min(blocks, 6) + 1), key=side)
    return columns, side(columns)


def mosaic(maps: Sequence[Array], experts: int, rows: int) -> Array:
    """Return tables (E, P) as one picture of square maps, `experts` in each of `rows`, 0 where there is none."""
    tiling = Tiling.of(maps[0].shape[1])
    side, pitch, width = tiling.side, tiling.pitch, tiling.side * tiling.zoom
    picture = np.zeros((rows, pitch, experts, pitch))
    for row, table in zip(picture, maps, strict=False):
        squares = table.reshape(len(table), side, side).repeat(tiling.zoom, axis=1).repeat(tiling.zoom, axis=2)
        row[:width, : len(table), :width] = squares.transpose(1, 0, 2)
    return picture.reshape(rows * pitch, experts * pitch)[: -tiling.gap, : -tiling.gap]


def _frame(panel: Any, counts: Sequence[int], tiling: Tiling) -> None:
    """Draw lines between the maps of a mosaic, whose rows have `counts` maps."""
    style = {"color": INK, "linewidth": 0.4, "alpha": 0.6, "clip_on": False}
    for i in range(len(counts) + 1):
        end = tiling.border(max(counts[max(i - 1, 0) : i + 1]))
        panel.plot([tiling.border(0), end], [tiling.border(i)] * 2, **style)
    for j in range(max(counts) + 1):
        rows = [(i, i + 1) if j <= count else (np.nan, np.nan) for i, count in enumerate(counts)]
        panel.plot([tiling.border(j)] * (2 * len(rows)), [tiling.border(i) for row in rows for i in row], **style)
    edge = (tiling.gap + 1) / 2
    panel.set_xlim(tiling.border(0) - edge, tiling.border(max(counts)) + edge)
    panel.set_ylim(tiling.border(len(counts)) + edge, tiling.border(0) - edge)


def _name_maps(axis: Any, cells: range, first: int, tiling: Tiling) -> None:
    """Write a number beside the middle of each map of `cells`, counted from `first`."""
    axis.set_ticks([tiling.middle(cell) for cell in cells], [str(first + cell) for cell in cells])
    axis.set_tick_params(length=0)


def _diverging() -> Any:
    """Return a colour map whose middle is transparent, so that the page shows where nothing deviates."""
    from matplotlib.colors import LinearSegmentedColormap

    ends = ((0.16, 0.49, 0.89), (0.92, 0.46, 0.12))
    stops = [(*ends[0], 1.0), (*ends[0], 0.0), (*ends[1], 0.0), (*ends[1], 1.0)]
    points = [0.0, 0.5, 0.5, 1.0]
    colours = LinearSegmentedColormap.from_list("deviation", list(zip(points, stops, strict=True)), N=LEVELS)
    return colours.with_extremes(bad=(0.5, 0.5, 0.5, 0.35))


def _image(panel: Any, matrix: Array, limit: float, aspect: str = "auto") -> Any:
    from matplotlib.ticker import MaxNLocator

    image = panel.imshow(
        np.ma.masked_invalid(matrix),
        cmap=_diverging(),
        vmin=-limit,
        vmax=limit,
        aspect=aspect,
        interpolation="none",
        clip_on=False,
    )
    panel.patch.set_visible(False)
    for axis, size in ((panel.xaxis, matrix.shape[1]), (panel.yaxis, matrix.shape[0])):
        axis.set_major_locator(MaxNLocator(nbins=min(size, 6), integer=True, min_n_ticks=1))
    return image


def _lines(panel: Any, xlabel: str, ylabel: str, points: int) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel(xlabel)
    panel.set_ylabel(ylabel)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=min(points, 12), integer=True, min_n_ticks=1))
    panel.grid(alpha=0.2, linewidth=0.5)


def load(figure: Figure, report: ProfileReport) -> None:
    """Paint the load of each expert, and the entropy of each block's load."""
    table = table_of([block.load for block in report.blocks]) - 1.0
    figure.set_size_inches(WIDTH, min(max(1.6 + 0.12 * len(table), 2.4), 6.0))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    scale = Scale("load ratio − 1", limit_of([table]))
    image = _image(left, table, scale.limit)
    left.set_xlabel("block")
    left.set_ylabel("expert")
    dead = np.array(report.dead).reshape(-1, 2)
    left.scatter(dead[:, 0], dead[:, 1], marker="x", color=INK, s=18, linewidths=0.8)
    _colour_bar(figure, image, left, scale, is_cut([table], scale.limit))
    entropy = [block.entropy for block in report.blocks]
    right.plot(entropy, color=COLOURS[0], marker="o", markersize=3, linewidth=1)
    right.set_ylim(min(0.9, min(entropy) - 0.02), 1.005)
    _lines(right, "block", "normalised entropy of load", len(entropy))


def information(figure: Figure, report: ProfileReport) -> None:
    """Paint a panel per variable: what it explains of the choices in each block."""
    names = [name for name in VARIABLES if name in report.blocks[0].information]
    figure.set_size_inches(WIDTH, 2.6)
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


def concentration(figure: Figure, report: ProfileReport) -> None:
    """Paint the concentration of load by step bin, of each block and on average."""
    figure.set_size_inches(WIDTH, 2.8)
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


def kept(figure: Figure, report: ProfileReport, names: Sequence[str]) -> None:
    """Paint a panel per pairing of `names`: the share of choices kept, and dashed what chance keeps."""
    figure.set_size_inches(WIDTH, 2.6)
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for panel, name in zip(panels, names, strict=True):
        agreed = [block.agreement[name] for block in report.blocks]
        _by_depth(figure, panel, [np.where(a.chance > 0, a.kept, np.nan) for a in agreed], legend=name == names[-1])
        _by_depth(figure, panel, [np.where(a.chance > 0, a.chance, np.nan) for a in agreed], legend=False, style="--")
        panel.set_ylim(0, 1.02)
        panel.set_title(AGREEMENTS[name])
        _lines(panel, "step bin (0: noise)", "share of experts" if name == names[0] else "", len(agreed[0].kept))


def saliency(figure: Figure, report: ProfileReport) -> None:
    """Paint a panel per criterion: each block's column over its mean, less 1."""
    tables = relative_saliency(report)
    figure.set_size_inches(WIDTH, min(max(1.0 + 0.08 * len(next(iter(tables.values()))), 1.6), 4.0) * 2)
    panels = figure.subplots(2, 3)
    for panel in panels.flat[len(tables) :]:
        panel.set_axis_off()
    for panel, (name, table) in zip(panels.flat, tables.items(), strict=False):
        image = _image(panel, table, LARGEST_DEVIATION)
        panel.set_title(name)
        panel.set_xlabel("block")
        panel.set_ylabel("expert")
    scale = Scale("over the block's mean, less 1", LARGEST_DEVIATION)
    _colour_bar(figure, image, panels, scale, is_cut(list(tables.values()), scale.limit), 0.6)


def relative_saliency(report: ProfileReport) -> dict[str, Array]:
    """Return each criterion over its block's mean, less 1, as a table (E, L)."""
    return {
        name: table_of([b.saliency[name] / max(float(b.saliency[name].mean()), 1e-300) - 1.0 for b in report.blocks])
        for name in report.blocks[0].saliency
    }


def router(figure: Figure, report: ProfileReport) -> None:
    """Paint the router's entropy, margin and top-k mass by step bin, a line per block."""
    figure.set_size_inches(WIDTH, 2.6)
    panels = figure.subplots(1, 3)
    titles = {"entropy": "entropy in nats", "margin": "margin", "topk_mass": "top-k mass"}
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        _by_depth(figure, panel, [block.router[name] for block in report.blocks], legend=name == "topk_mass")
        panel.set_title(title)
        _lines(panel, "step bin (0: noise)", "", len(report.blocks[0].router[name]))


def sensitivity(figure: Figure, found: SensitivityMap) -> None:
    """Paint a panel per part: the error without it by block and step bin, all on one logarithmic scale."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    tables = {part: np.asarray(rows).T for part, rows in found.errors.items()}
    figure.set_size_inches(WIDTH, min(max(1.4 + 0.1 * found.blocks, 2.0), 5.5))
    panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    largest = max(float(table.max()) for table in tables.values()) or 1.0
    scale = LogNorm(largest / DECADES, largest)
    for panel, (part, table) in zip(panels, tables.items(), strict=True):
        panel.imshow(
            np.clip(table, largest / DECADES, None),
            cmap=_growing(),
            norm=scale,
            aspect="auto",
            interpolation="none",
            clip_on=False,
        )
        panel.patch.set_visible(False)
        panel.set_title(f"without {PARTS[part]}")
        panel.set_xlabel("step bin (0: noise)")
        panel.xaxis.set_major_locator(_whole(table.shape[1]))
        panel.yaxis.set_major_locator(_whole(table.shape[0]))
    panels[0].set_ylabel("block")
    bar = figure.colorbar(ScalarMappable(scale, _growing()), ax=panels, pad=0.01, extend="min", label="relative error")
    bar.outline.set_linewidth(0.6)


def _growing() -> Any:
    """Return a colour map from a transparent page to orange."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("growing", [(0.92, 0.46, 0.12, 0.0), (0.92, 0.46, 0.12, 1.0)], N=LEVELS)
