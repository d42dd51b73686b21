"""``ditmoe plan``: show, check and compare plans."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ditmoe_cli.cli.stage import Stage
from ditmoe_cli.cli.terminal import JsonPrinting, Row, emit
from ditmoe_cli.compression.plan import (
    CompressionPlan,
    Differences,
    Experts,
    Formats,
    PlanStage,
    plan_difference,
    read_plan,
)
from ditmoe_cli.formats.registry import format_label

EXAMPLES = (
    "ditmoe prune ckpt.pt --keep 0.5 --dry-run > plan.json",
    "ditmoe plan plan.json",
    "ditmoe plan plan.json other.json",
)


@dataclass(frozen=True)
class Plans:
    """A plan, and another one to compare it with."""

    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan, or the output of a planner's --dry-run.")]
    other: Annotated[Path | None, typer.Argument(metavar="OTHER", help="Another plan to compare with.")] = None


def run(plans: Plans, printing: JsonPrinting) -> None:
    """Show, check or compare compression plans.

    With OTHER, prints where the two differ.
    """
    plan, stage = read_plan(plans.file), Stage()
    if plans.other is None:
        document = stage.to_json({"plan": plan.to_json(), "digest": plan.digest})
        return emit(printing, document, rows(plan), None, editable=True)
    lines = plan_difference(plan, read_plan(plans.other))
    result = {"same": not lines, "differences": lines}
    return emit(printing, stage.to_json(result), [("differs", line) for line in lines] or [("same", "yes")], None)


def rows(plan: CompressionPlan) -> list[Row]:
    """Return a plan as a table."""
    return [
        ("command", plan.command),
        ("for checkpoint", plan.source),
        ("by profile", plan.profile or "none"),
        ("options", ", ".join(f"{name} {value}" for name, value in plan.options.items()) or "none"),
        *(row for stage in plan.stages for row in stage_rows(stage)),
    ]


def stage_rows(stage: PlanStage) -> list[Row]:
    """Return a stage of a plan as rows of its table."""
    match stage:
        case Experts():
            blocks = enumerate(stage.blocks)
            return [(f"block {i}", f"{b.router}, keeps {' '.join(map(str, b.keep))}") for i, b in blocks]
        case Differences():
            return [("differences", f"{stage.kind} {stage.ratio:g}")]
        case Formats():
            counts = sorted(Counter(map(format_label, stage.formats.values())).items())
            orders: list[Row] = [("orders neurons", f"by {stage.ordering}")] if stage.ordering else []
            return orders + [("quantises", f"{count} weights to {name}") for name, count in counts]
