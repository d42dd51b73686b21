"""What changed between two plans, and for which blocks and weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ditmoe_cli.api.plan_facts import GROUPS
from ditmoe_cli.cli.costs import (
    error_rows,
    in_runs,
    repair_text,
    retraining_text,
    rounding_text,
    selection_text,
    widths_text,
)
from ditmoe_cli.compression.plan import FIGURES, BlockPlan, CompressionPlan, Differences, Experts, Formats, Retraining
from ditmoe_cli.files.names import split_name
from ditmoe_cli.formats.registry import format_label
from ditmoe_cli.model.parameters import group_of

S = TypeVar("S", Experts, Differences, Retraining, Formats)


@dataclass(frozen=True)
class Difference:
    """One difference: of what, how it is in both plans, and in how many matrices, where it is formats."""

    what: str
    a: str
    b: str
    matrices: int | None = None

    @property
    def text(self) -> str:
        """Both sides in one line."""
        if self.matrices is None:
            return f"{self.a} | {self.b}"
        return f"{self.a} → {self.b} ({self.matrices} {'matrix' if self.matrices == 1 else 'matrices'})"


def plan_differences(a: CompressionPlan, b: CompressionPlan) -> list[Difference]:
    """Return where two plans differ; nothing where they would do the same."""
    found = [
        Difference(name, str(x), str(y))
        for name, x, y in (("command", a.command, b.command), ("checkpoint", a.source, b.source))
        if x != y
    ]
    if a.profile != b.profile:
        found.append(Difference("profile", a.profile or "none", b.profile or "none"))
    found += _settings("calibration", a.calibration, b.calibration)
    found += _settings("option", _asked(a), _asked(b))
    found += _worded("prediction error", _errors(a), _errors(b), lambda text: text or "not known")
    experts = _stage(a, Experts) or Experts(), _stage(b, Experts) or Experts()
    formats = _stage(a, Formats) or Formats(), _stage(b, Formats) or Formats()
    if experts[0].merging != experts[1].merging:
        found.append(Difference("merging", experts[0].merging or "none", experts[1].merging or "none"))
    narrowed = [any(block.widths or block.shared_width for block in stage.blocks) for stage in experts]
    if all(narrowed):
        found += _worded("neurons", experts[0].selection, experts[1].selection, selection_text)
    found += _worded("refit", experts[0].repair, experts[1].repair, repair_text)
    found += _worded(
        "differences",
        _stage(a, Differences),
        _stage(b, Differences),
        lambda d: f"{d.kind} {d.ratio:g}" if d else "none",
    )
    found += _worded("training", a.retraining, b.retraining, retraining_text)
    found += _worded("rounding", formats[0].rounding, formats[1].rounding, rounding_text)
    if formats[0].ordering != formats[1].ordering:
        found.append(Difference("order of neurons", formats[0].ordering or "kept", formats[1].ordering or "kept"))
    return [*found, *_blocks(*experts), *_formats(formats[0].formats, formats[1].formats)]


def _stage(plan: CompressionPlan, kind: type[S]) -> S | None:
    return next((stage for stage in plan.stages if isinstance(stage, kind)), None)


def _asked(plan: CompressionPlan) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in plan.options.items() if name not in FIGURES}


def _errors(plan: CompressionPlan) -> str:
    """Return the figures of a plan's choice as its table tells them; nothing where it has none."""
    return ", ".join(str(text) for _, text in error_rows(plan.options))


def _settings(what: str, a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> list[Difference]:
    """Return one difference for each setting; one in all where a plan has no settings at all."""
    if a is None or b is None:
        return [] if a is b else [Difference(what, "none" if a is None else str(a), "none" if b is None else str(b))]
    names = [name for name in sorted(a.keys() | b.keys()) if (name in a) != (name in b) or a[name] != b[name]]
    return [Difference(f"{what} {name}", _given(a, name), _given(b, name)) for name in names]


def _given(settings: Mapping[str, Any], name: str) -> str:
    return str(settings[name]) if name in settings else "not given"


def _worded(what: str, a: Any, b: Any, text: Any) -> list[Difference]:
    """Return the difference of two settings by their `text`, by their fields where that is the same."""
    if a == b:
        return []
    texts = (text(a), text(b))
    return [Difference(what, *(texts if texts[0] != texts[1] else (str(a), str(b))))]


def _aspects(block: BlockPlan | None) -> dict[str, str]:
    """Return what becomes of a block's experts, by aspect."""
    if block is None:
        return {"keep": "not planned"}
    return {
        "keep": f"keeps {in_runs(block.keep)}",
        "merged": "merges " + (", ".join(f"{e} into {into}" for e, into in block.merged) or "none"),
        "widths": f"widths {widths_text(block.widths)}" if block.widths else "all neurons",
        "shared": "shared expert " + ("whole" if block.shared_width is None else str(block.shared_width)),
        "constants": "constants" if block.constants else "no constants",
        "rank": f"rank {block.rank}",
        "router": f"router {block.router}",
    }


def _blocks(a: Experts, b: Experts) -> Iterator[Difference]:
    """Yield what differs in each block, neighbours that differ alike joined."""
    texts: list[tuple[str, str] | None] = []
    for index in range(max(len(a.blocks), len(b.blocks))):
        x, y = (stage.blocks[index] if index < len(stage.blocks) else None for stage in (a, b))
        sides = [_aspects(x), _aspects(y)]
        names = sides[0] if x and y else ("keep",)
        differ = [name for name in names if sides[0].get(name) != sides[1].get(name)]
        left, right = ("; ".join(side[name] for name in differ if name in side) for side in sides)
        if x != y and left == right:  # many widths are told by their range only
            left, right = str(x), str(y)
        texts.append((left, right) if x != y else None)
    for first, last, sides_of in _runs(dict(enumerate(texts))):
        if sides_of is not None:
            yield Difference(_named(first, last), *sides_of)


def _formats(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Difference]:
    """Yield how many matrices of each group change their format, block by block, neighbours alike joined."""
    counts: Counter[tuple[str, str, str, int | None]] = Counter()
    for name in sorted(a.keys() | b.keys()):
        old, new = a.get(name, "unchanged"), b.get(name, "unchanged")
        if old != new:
            labels = tuple(fmt if fmt == "unchanged" else format_label(fmt) for fmt in (old, new))
            left, right = labels if labels[0] != labels[1] else (old, new)
            group = group_of(name)
            counts[GROUPS[group] if group is not None else name, left, right, split_name(name).block] += 1
    for group_name, left, right in dict.fromkeys(key[:3] for key in counts):
        of_block = {block: n for (*change, block), n in counts.items() if change == [group_name, left, right]}
        outside = of_block.pop(None, None)
        for first, last, count in _runs({block: n for block, n in sorted(of_block.items()) if block is not None}):
            yield Difference(f"{_named(first, last)} {group_name}", left, right, count * (last - first + 1))
        if outside is not None:
            yield Difference(group_name, left, right, outside)


T = TypeVar("T")


def _runs(values: Mapping[int, T]) -> list[tuple[int, int, T]]:
    """Return runs of neighbouring numbers with equal values as (first, last, value)."""
    runs: list[tuple[int, int, T]] = []
    for index, value in values.items():
        if runs and runs[-1][1] == index - 1 and runs[-1][2] == value:
            runs[-1] = (runs[-1][0], index, value)
        else:
            runs.append((index, index, value))
    return runs


def _named(first: int, last: int) -> str:
    return f"block {first}" if first == last else f"blocks {first}-{last}"
