"""``ditmoe plan``: show, check and compare plans."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ditmoe_cli.cli.costs import error_rows, plan_rows
from ditmoe_cli.cli.stage import Stage
from ditmoe_cli.cli.terminal import JsonPrinting, Row, emit
from ditmoe_cli.compression.plan import FIGURES, CompressionPlan, plan_difference, read_plan

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
        document = stage.to_json({"plan": plan.document(), "digest": plan.digest, "edited": plan.edited})
        return emit(printing, document, rows(plan), None, editable=True)
    lines = plan_difference(plan, read_plan(plans.other))
    result = {"same": not lines, "differences": lines}
    return emit(printing, stage.to_json(result), [("differs", line) for line in lines] or [("same", "yes")], None)


def rows(plan: CompressionPlan) -> list[Row]:
    """Return a plan as a table."""
    figures = error_rows(plan.options)
    options = {name: value for name, value in plan.options.items() if name not in FIGURES}
    return [
        ("command", plan.command),
        ("for checkpoint", plan.source),
        ("by profile", plan.profile or "none"),
        ("options", ", ".join(f"{name} {value}" for name, value in options.items()) or "none"),
        *([("edited", f"since it was planned as {plan.written[:12]}")] if plan.edited and plan.written else []),
        *plan_rows(plan, by_block=True),
        *figures,
        ("digest", plan.digest),
    ]
