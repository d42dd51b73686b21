"""``ditmoe plan``: show, check and compare plans."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from ditmoe_cli.cli.costs import error_rows, plan_rows
from ditmoe_cli.cli.plan_differences import plan_differences
from ditmoe_cli.cli.stage import Stage
from ditmoe_cli.cli.terminal import JsonPrinting, Row, emit
from ditmoe_cli.compression.plan import FIGURES, CompressionPlan, read_plan
from ditmoe_cli.files.json_text import read_json
from ditmoe_cli.progress import human_bytes

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

    With OTHER, prints what changes for which blocks and weights.
    """
    plan, stage = read_plan(plans.file), Stage()
    size = told_bytes(plans.file, plan)
    if plans.other is None:
        told = {"plan": plan.document(), "digest": plan.digest, "edited": plan.edited, "bytes": size}
        sized = [("bytes", f"{size:,} ({human_bytes(size)})")] if size is not None else []
        return emit(printing, stage.to_json(told), [*rows(plan), *sized], None, editable=True)
    other = read_plan(plans.other)
    found, sizes = plan_differences(plan, other), (size, told_bytes(plans.other, other))
    result = {"same": not found, "differences": [asdict(each) for each in found], "bytes": list(sizes)}
    differing = [(each.what, each.text) for each in found]
    if found and sizes != (None, None):
        differing.append(("bytes", " | ".join("not known" if each is None else f"{each:,}" for each in sizes)))
    return emit(printing, stage.to_json(result), differing or [("same", "yes")], None)


def told_bytes(path: Path, plan: CompressionPlan) -> int | None:
    """Return the bytes that the dry run which printed a plan predicted; None where the file has none, or is edited."""
    document = read_json(path, names=True)
    result = document.get("result") if isinstance(document, dict) else None
    size = result.get("bytes") if isinstance(result, dict) else None
    return size if type(size) is int and not plan.edited else None


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
