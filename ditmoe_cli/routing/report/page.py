"""A profile report as one HTML page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from ditmoe_cli.diffusion.schedule import SOLVERS
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.dtypes import recorded_dtype
from ditmoe_cli.routing.report.captions import listed
from ditmoe_cli.routing.report.claims import VARIABLES
from ditmoe_cli.routing.report.contents import BlockReport, ProfileReport
from ditmoe_cli.routing.report.figures import agreements
from ditmoe_cli.routing.report.marks import numbers_element
from ditmoe_cli.routing.report.painters import AGREEMENTS
from ditmoe_cli.routing.report.pictures import INK, Drawing
from ditmoe_cli.routing.sensitivity.sensitivity_map import PARTS, SensitivityMap

_CLASSES = {"holds": "holds", "partly": "partly", "does not hold": "not", "cannot be told": "unknown"}
# the sections that show figures, and how the names of theirs start
_SECTIONS = {
    "load": ("load",),
    "information": ("information", "concentration"),
    "maps": ("map-",),
    "relations": ("coactivation", "similarity", "transitions", "agreement"),
    "saliency": ("saliency",),
    "router": ("router",),
    "sensitivity": ("sensitivity",),
}
_FAMILIES = {"rf": " (rectified flow)", "ddpm": " (DDPM)"}
_FULL_ONLY = {
    "easy_ep": "EASY-EP saliency",
    "output.gram": "similarity in the residual stream",
    "output.all_token_mean": "similarity of mean outputs",
    "output.cka": "similarity of outputs",
}


class Chance(NamedTuple):
    """A cell of a table that says what chance reaches, beside the value that it belongs to."""

    chance: str


class PageTable(NamedTuple):
    """A table of the page: head and rows, cell by cell."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Chance]]


def require_jinja() -> None:
    """Raise `BadInputError` where jinja2 is not installed."""
    if find_spec("jinja2") is None:
        raise BadInputError("the page needs jinja2, which is not here; install it: pip install 'ditmoe[report]'")


def page(report: ProfileReport, drawings: Iterable[Drawing], request: str = "") -> str:
    """Return the page, with those of its figures that are among `drawings`; it says which `request` it was made of.

    Raises `BadInputError` where jinja2 is not installed.
    """
    require_jinja()
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def escaped(value: object) -> object:
        """Escape as `html.escape` does, so that a page's bytes do not depend on how jinja2 writes quotes."""
        return value if hasattr(value, "__html__") else Markup(escape(str(value)))

    environment = Environment(
        autoescape=True, finalize=escaped, trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    template = environment.from_string((files(__package__) / "page.html.jinja").read_text(encoding="utf-8"))
    figures, blocks = tuple(drawings), report.blocks
    return template.render(
        report=report,
        request=request,
        numbers=Markup(numbers_element(report.to_json())),
        shape=_shape(blocks),
        settings=_settings(report),
        explained=_explained(report),
        verdicts=_CLASSES,
        figures={name: [d for d in figures if d.name.startswith(starts)] for name, starts in _SECTIONS.items()},
        inline=lambda drawing: Markup(_inline(drawing, report.name)),
        missing=_missing(report),
        load=_load(blocks),
        information=_information(report),
        agreement=_agreement(report),
        rank_agreement=_rank_agreement(blocks),
        saliency=[_saliency(block) for block in blocks],
        router=_router(blocks),
        sensitivity=_sensitivity(report.sensitivity) if report.sensitivity is not None else None,
        mapped=_mapped(report.sensitivity) if report.sensitivity is not None else "",
    )


def _settings(report: ProfileReport) -> str:
    run = report.calibration
    solver = str(run.get("solver", "unknown"))
    family = next((_FAMILIES[info.family] for key, info in SOLVERS.items() if key == solver), "")
    images = "noised images" if run.get("source") == "data" else "images"
    parts = [
        f"{run['images']} {images} of {_count(len(report.classes), 'class', 'classes')}",
        f"{run['steps']} steps in {_count(int(run['bins']), 'bin')}",
        f"guidance {float(run['cfg']):g}",
        f"solver {solver}{family}",
        *([f"computed in {run['dtype']}"] if recorded_dtype(run) != "fp32" else []),
        *(["counters alone"] if run.get("fast") is True else []),
    ]
    return f"{', '.join(parts)}; intervals from {report.replicates} replicates, seed {report.seed}"


def _shape(blocks: Sequence[BlockReport]) -> str:
    """Return how many blocks and experts there are."""
    sizes = [len(block.load) for block in blocks]
    low, high = min(sizes), max(sizes)
    experts = _count(low, "expert") if low == high else f"{low} to {high} experts"
    return f"{_count(len(blocks), 'block')}, {experts}"


def _count(number: int, one: str, several: str = "") -> str:
    return f"one {one}" if number == 1 else f"{number} {several or one + 's'}"


def _missing(report: ProfileReport) -> str:
    """Return what the profile lacks and why, "" where nothing."""
    if not report.missing:
        return ""
    names = ", ".join(_FULL_ONLY[name] for name in report.missing)
    if report.calibration.get("fast") is True:
        return f"{names}. It is a fast profile, of counters alone; a full one has these."
    return f"{names}. It was made by an earlier version; profile again for these."


def _explained(report: ProfileReport) -> str:
    """Return the sentence above the table of information."""
    names = [name for name in VARIABLES if name in report.evidence.information]
    if not names:
        return "The profile has one position, one step bin and one class: choices have nothing to depend on."
    conditional = [name for name in names if name != "branch"]
    where = f" {listed(conditional).capitalize()} in the conditional branch." if "branch" in names else ""
    return (
        "I(x; expert) / H(expert) in percent: how much of the entropy of expert choices x explains, with the bias of "
        f"counting taken off, its 95 % interval over images, and what chance reaches (in 95 of 100 shuffles).{where}"
    )


def _inline(drawing: Drawing, name: str) -> str:
    """Return a drawing's SVG element in the page's text colour, named for those who cannot see it."""
    picture = drawing.svg.replace(INK, "currentColor")
    return picture.replace("<svg", f'<svg role="img" aria-label="{escape(f"{drawing.title}: {name}")}"', 1)


def _information(report: ProfileReport) -> PageTable:
    """Return the share of entropy that each variable explains, by block and on average."""
    names = [name for name in VARIABLES if name in report.blocks[0].information]
    rows: list[list[str | Chance]] = []
    for i, block in enumerate(report.blocks):
        cells: list[str | Chance] = [str(i)]
        for estimate in (block.information[name] for name in names):
            cells.append(_percent(estimate.corrected, estimate.low, estimate.high))
            cells.append(Chance(f"{100 * estimate.null_high:.2f}"))
        rows.append(cells)
    means: list[str | Chance] = ["mean"]
    for mean in (report.evidence.information[name] for name in names):
        means += [_percent(mean.value, mean.low, mean.high), ""]
    return PageTable(["block", *(cell for name in names for cell in (name, "chance"))], [*rows, means])


def _percent(value: float, low: float, high: float) -> str:
    return f"{100 * value:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def _load(blocks: Sequence[BlockReport]) -> PageTable:
    head = ["block", "normalised entropy", "effective experts", "Gini", "CV", "MaxVio", "least", "most"]
    rows = []
    for i, b in enumerate(blocks):
        values = (b.entropy, b.effective, b.gini, b.variation, b.max_violation, b.load.min(), b.load.max())
        rows.append([str(i), *(f"{value:.3f}" for value in values)])
    return PageTable(head, rows)


def _rank_agreement(blocks: Sequence[BlockReport]) -> PageTable:
    names = list(blocks[0].saliency)
    mean = np.mean([block.rank_agreement for block in blocks], axis=0)
    rows = [[name, *(f"{value:.2f}" for value in row)] for name, row in zip(names, mean, strict=True)]
    return PageTable(["", *names], rows)


def _saliency(block: BlockReport) -> PageTable:
    rows = [
        [str(e), *(f"{values[e]:.4g}" for values in block.saliency.values()), f"{block.load[e]:.3f}"]
        for e in range(len(block.load))
    ]
    return PageTable(["expert", *block.saliency, "load ratio"], rows)


def _agreement(report: ProfileReport) -> PageTable:
    """Return what share of its experts a token keeps, beside chance, and how far apart the branches' loads are."""
    names = agreements(report)
    distance = ["Jensen-Shannon distance of the branches"] if report.branches > 1 else []
    rows = []
    for i, block in enumerate(report.blocks):
        cells: list[str | Chance] = [str(i)]
        for agreement in (block.agreement[name] for name in names):
            known = agreement.chance > 0
            kept, chance = (
                float(values[known].mean()) if known.any() else 0.0 for values in (agreement.kept, agreement.chance)
            )
            cells += [f"{kept:.3f}", Chance(f"{chance:.3f}")]
        rows.append([*cells, *([f"{block.branch_distance:.3f}"] if distance else [])])
    titles = [AGREEMENTS[name].removeprefix("with the ") for name in names]
    return PageTable(["block", *(cell for title in titles for cell in (title, "chance")), *distance], rows)


def _router(blocks: Sequence[BlockReport]) -> PageTable:
    head = ["block", "entropy (nats)", "margin", "top-k mass", "information with the next block"]
    rows = []
    for i, b in enumerate(blocks):
        means = [f"{values.mean():.3f}" for values in b.router.values()]
        rows.append([str(i), *means, "–" if b.next_information is None else f"{100 * b.next_information:.1f} %"])
    return PageTable(head, rows)


def _sensitivity(found: SensitivityMap) -> PageTable:
    """Return the errors without each part over all steps, by block."""
    errors = [found.by_block(part) for part in found.errors]
    rows = [[str(i), *(f"{error:.3g}" for error in row)] for i, row in enumerate(zip(*errors, strict=True))]
    return PageTable(["block", *(f"without {PARTS[part]}" for part in found.errors)], rows)


def _mapped(found: SensitivityMap) -> str:
    """Return how the states of a map were sampled."""
    run = found.sampling
    return (
        f"{_count(int(run['images']), 'image')}, {run['steps']} steps of {run['solver']} in "
        f"{_count(found.bins, 'bin')}, guidance {float(run['cfg']):g}"
    )
