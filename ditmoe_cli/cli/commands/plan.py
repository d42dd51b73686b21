"""``ditmoe plan``: show, check and compare plans."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ditmoe_cli.cli.options import Json
from ditmoe_cli.cli.stage import Stage
from ditmoe_cli.cli.terminal import Printing, Row, emit

if TYPE_CHECKING:
    from ditmoe_cli.compression.plan import CompressionPlan, PlanStage

PlanArg = Annotated[Path, typer.Argument(metavar="FILE", help="A plan, or the output of a planner's --dry-run.")]
OtherArg = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Argument(metavar="OTHER", help="Another plan to compare with."),
]


def run(file: PlanArg, other: OtherArg = None, json: Json = False) -> None:
    """Show, check or compare compression plans.

    With OTHER, prints in what the two differ.
    """
    from ditmoe_cli.compression.plan import plan_difference, read_plan

    plan, stage = read_plan(file), Stage()
    if other is None:
        return emit(Printing(json), stage.to_json({"plan": plan.to_json(), "digest": plan.digest}), rows(plan), None)
    lines = plan_difference(plan, read_plan(other))
    result = {"same": not lines, "differences": lines}
    return emit(Printing(json), stage.to_json(result), [("differs", line) for line in lines] or [("same", "yes")], None)


def rows(plan: CompressionPlan) -> list[Row]:
    """Return a plan as a table."""
    return [
        ("command", plan.command),
        ("for checkpoint", plan.source),
        ("by profile", plan.profile or "none"),
        ("options", ", ".join(f"{name} {value}" for name, value in plan.options.items()) or "none"),
        *(row for stage in plan.stages for row in _stage_rows(stage)),
    ]


def _stage_rows(stage: PlanStage) -> list[Row]:
    """Return a stage of a plan as rows of its table."""
    from ditmoe_cli.compression.plan import Differences, Experts, Formats
    from ditmoe_cli.formats.weights import format_label

    match stage:
        case Experts():
            blocks = enumerate(stage.blocks)
            return [(f"block {i}", f"{b.router}, keeps {' '.join(map(str, b.keep))}") for i, b in blocks]
        case Differences():
            return [("differences", f"{stage.kind} {stage.ratio:g}")]
        case Formats():
            counts = sorted(Counter(map(format_label, stage.formats.values())).items())
            orders: list[Row] = [("orders neurons", f"by {stage.ordering}")] if stage.ordering else []
            return orders + [("quantises", f"{count} weights to {fmt}") for fmt, count in counts]
