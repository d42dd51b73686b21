"""A profile report as one HTML page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from ditmoe_cli.routing.report.claims import Claim
from ditmoe_cli.routing.report.contents import VARIABLES, BlockReport, ProfileReport
from ditmoe_cli.routing.report.figures import AGREEMENTS, INK, Drawing, agreements

_STYLE = """
:root { color-scheme: light dark; --text: #1d2126; --soft: #5b636d; --page: #fff; --card: #f4f6f8; --line: #d8dde3;
  --holds: #1a7f45; --partly: #9a6100; --not: #b3342d; --unknown: #5b636d }
@media (prefers-color-scheme: dark) { :root { --text: #e3e7eb; --soft: #a0a9b3; --page: #14171a; --card: #1e2327;
  --line: #363d44; --holds: #5fcf8d; --partly: #e9b04c; --not: #f0847c; --unknown: #a0a9b3 } }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 62rem; padding: 1.5rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem } h3 { font-size: 1rem; margin: 0 }
.soft, figcaption { color: var(--soft); font-size: .9rem } code { font-size: .88em; overflow-wrap: anywhere }
.claim { background: var(--card); border-left: 4px solid; border-radius: 4px; margin: .7rem 0; padding: .7rem 1rem }
.claim p { color: var(--text); margin: .2rem 0 0 } .claim h3 { color: var(--text) }
.holds { color: var(--holds) } .partly { color: var(--partly) } .not { color: var(--not) }
.unknown { color: var(--unknown) }
figure { margin: 1.6rem 0 } figure h3 { margin-bottom: .2rem }
svg { color: var(--soft); display: block; height: auto; max-width: 100% }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem .25rem 0; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } td.soft { font-size: .88rem }
details { margin: .8rem 0 } summary { cursor: pointer }
"""

_VERDICTS = {"holds": "holds", "partly": "partly", "does not hold": "not", "cannot be told": "unknown"}
_RELATIONS = ("coactivation", "transitions", "agreement")
_OPTIONS = {
    "easy_ep": "EASY-EP saliency",
    "output.gram": "similarity in the residual stream",
    "output.all_token_mean": "similarity of mean outputs",
    "output.cka": "similarity of outputs",
}


def page(report: ProfileReport, drawings: Iterable[Drawing]) -> str:
    """Return the page."""
    figures = {drawing.name: drawing for drawing in drawings}
    parts = [
        *_head(report),
        *(_claim(claim) for claim in report.claims),
        "<h2>Load</h2>",
        *_callouts(report),
        *_shown(figures, ("load",)),
        _details("Numbers by block", _load_table(report.blocks)),
        "<h2>What expert choices depend on</h2>",
        _INFORMATION,
        _information_table(report),
        *_shown(figures, ("information", "concentration")),
        "<h2>Where experts are chosen</h2>",
        *_shown(figures, tuple(name for name in figures if name.startswith("map-"))),
        "<h2>Experts among each other</h2>",
        *_missing(report),
        *_shown(figures, tuple(name for name in figures if name in _RELATIONS or name.startswith("similarity"))),
        _details("Choices kept by block, means over steps", _agreement_of_choices(report)),
        "<h2>Saliency</h2>",
        *_shown(figures, ("saliency",)),
        '<p class="soft">Rank agreement of the criteria (Spearman), averaged over blocks:</p>',
        _agreement_table(report.blocks),
        *(_details(f"Block {i}", _saliency_table(block)) for i, block in enumerate(report.blocks)),
        "<h2>Router</h2>",
        *_shown(figures, ("router",)),
        _details("Means over steps by block", _router_table(report.blocks)),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


_INFORMATION = (
    '<p class="soft">I(x; expert) / H(expert) in percent: how much of the entropy of expert choices x explains, with '
    "the bias of counting taken off, its 95 % interval over images, and what chance reaches (in 95 of 100 shuffles). "
    "Position, step and class in the conditional branch.</p>"
)


def _head(report: ProfileReport) -> list[str]:
    run = report.calibration
    classes = f"{len(report.classes)} classes" if len(report.classes) > 1 else "one class"
    settings = (
        f"{run['images']} images of {classes}, {run['steps']} steps in {run['bins']} bins, guidance {run['cfg']}, "
        f"solver {run.get('solver', 'unknown')}; intervals from {report.replicates} replicates, seed {report.seed}"
    )
    return [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Routing profile of {escape(report.checkpoint[:12])}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        "<h1>Routing profile</h1>",
        f'<p class="soft">{len(report.blocks)} blocks, {_span([len(b.load) for b in report.blocks])} experts · '
        f"checkpoint <code>{escape(report.checkpoint)}</code><br>{escape(settings)}</p>",
        "<h2>Do the DiT-MoE paper's claims hold for this checkpoint?</h2>",
    ]


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _claim(claim: Claim) -> str:
    return (
        f'<div class="claim {_VERDICTS[claim.verdict]}"><h3>{escape(claim.statement)}</h3>'
        f"<strong>{escape(claim.verdict)}</strong><p>{escape(claim.sentence)}</p></div>"
    )


def _callouts(report: ProfileReport) -> list[str]:
    """Call dead and starved experts out by block and number."""
    lines = []
    found = (("Dead (never chosen)", report.dead), ("Starved (below a tenth of an even load)", report.starved))
    for what, pairs in found:
        named = ", ".join(f"block {b} expert {e}" for b, e in pairs) or "none"
        lines.append(f"<p><strong>{what}:</strong> {named}</p>")
    return lines


def _missing(report: ProfileReport) -> list[str]:
    """Say what the profile lacks, and which option is the reason."""
    if not report.missing:
        return []
    named = ", ".join(_OPTIONS[name] for name in report.missing)
    return [
        f"<p><strong>Not in this profile:</strong> {named}. It was made with --fast; profile without for these.</p>"
    ]


def _shown(figures: dict[str, Drawing], names: Sequence[str]) -> list[str]:
    return [_figure(figures[name]) for name in names if name in figures]


def _figure(drawing: Drawing) -> str:
    picture = drawing.svg.replace(INK, "currentColor")
    picture = picture.replace("<svg", f'<svg role="img" aria-label="{escape(drawing.title)}"', 1)
    return (
        f'<figure id="{escape(drawing.name)}"><h3>{escape(drawing.title)}</h3>\n{picture}'
        f"<figcaption>{escape(drawing.caption)}</figcaption></figure>"
    )


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are already HTML."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table></div>"


def _information_table(report: ProfileReport) -> str:
    names = [name for name in VARIABLES if name in report.blocks[0].information]
    rows = []
    for i, block in enumerate(report.blocks):
        cells = [str(i)]
        for estimate in (block.information[name] for name in names):
            cells.append(_percent(estimate.corrected, estimate.low, estimate.high))
            cells.append(f'<span class="soft">{100 * estimate.null_high:.2f}</span>')
        rows.append(cells)
    means = ["mean"]
    for interval in (report.evidence.information[name] for name in names):
        means += [_percent(interval.value, interval.low, interval.high), ""]
    return _table(["block", *(cell for name in names for cell in (name, "chance"))], [*rows, means])


def _percent(value: float, low: float, high: float) -> str:
    return f"{100 * value:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def _load_table(blocks: Sequence[BlockReport]) -> str:
    head = ["block", "normalised entropy", "effective experts", "Gini", "CV", "MaxVio", "least", "most"]
    rows = []
    for i, b in enumerate(blocks):
        values = (b.entropy, b.effective, b.gini, b.variation, b.max_violation, b.load.min(), b.load.max())
        rows.append([str(i), *(f"{value:.3f}" for value in values)])
    return _table(head, rows)


def _agreement_table(blocks: Sequence[BlockReport]) -> str:
    names = [escape(name) for name in blocks[0].saliency]
    mean = np.mean([block.rank_agreement for block in blocks], axis=0)
    rows = [[name, *(f"{value:.2f}" for value in row)] for name, row in zip(names, mean, strict=True)]
    return _table(["", *names], rows)


def _saliency_table(block: BlockReport) -> str:
    rows = [
        [str(e), *(f"{values[e]:.4g}" for values in block.saliency.values()), f"{block.load[e]:.3f}"]
        for e in range(len(block.load))
    ]
    return _table(["expert", *map(escape, block.saliency), "load ratio"], rows)


def _agreement_of_choices(report: ProfileReport) -> str:
    """Return what share of its experts a token keeps, and chance; and how far apart the branches' loads are."""
    names = agreements(report)
    distance = ["Jensen-Shannon distance of the branches"] if report.branches > 1 else []
    rows = []
    for i, block in enumerate(report.blocks):
        cells = [str(i)]
        for found in (block.agreement[name] for name in names):
            known = found.chance > 0
            kept, chance = (float(v[known].mean()) if known.any() else 0.0 for v in (found.kept, found.chance))
            cells += [f"{kept:.3f}", f'<span class="soft">{chance:.3f}</span>']
        rows.append([*cells, *([f"{block.branch_distance:.3f}"] if distance else [])])
    titles = [AGREEMENTS[name].removeprefix("with the ") for name in names]
    return _table(["block", *(cell for title in titles for cell in (title, "chance")), *distance], rows)


def _router_table(blocks: Sequence[BlockReport]) -> str:
    head = ["block", "entropy (nats)", "margin", "top-k mass", "information with the next block"]
    rows = []
    for i, b in enumerate(blocks):
        means = [f"{values.mean():.3f}" for values in b.router.values()]
        told = "–" if b.next_information is None else f"{100 * b.next_information:.1f} %"
        rows.append([str(i), *means, told])
    return _table(head, rows)
