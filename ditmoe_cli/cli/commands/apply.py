"""``ditmoe apply``: carry out a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api.plan_application import Application, applied_result, output_label
from ditmoe_cli.cli.options import ClockOpt, Destination, DeviceOpt, Source
from ditmoe_cli.cli.planning import Job, show_result
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing, note
from ditmoe_cli.compression.plan import read_plan

EXAMPLES = (
    "ditmoe apply ckpt.pt --plan plan.json",
    "ditmoe apply ckpt.pt --plan plan.json --profile ckpt.profile.safetensors -o small.safetensors",
)


@dataclass(frozen=True)
class Planned:
    """The plan, and what carrying it out takes."""

    panel: ClassVar[str] = "Plan"

    plan: Annotated[
        Path, typer.Option("--plan", metavar="FILE", help="The plan, or the output of a planner's --dry-run.")
    ]
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            metavar="FILE",
            help="Routing profile that the plan was made with, where weights are computed from it. "
            "[default: the one that the pipe names, else NAME.profile.safetensors, else the one that the planner made]",
        ),
    ] = None
    clock: ClockOpt = None
    device: DeviceOpt = "auto"


def run(planned: Planned, source: Source, to: Destination, printing: Printing) -> None:
    """Carry out a compression plan.

    The plan may have been edited; the checkpoint must be the one that it was made for. A plan that computes weights
    (by refitting, merging, narrowing or rounding with GPTQ) takes the profile that it was made with.
    """
    plan = read_plan(planned.plan)
    if plan.edited:
        note(f"{planned.plan}: the plan was edited since it was planned; the history of the output will say so")
    stage = source.stage()
    opened = open_stage(stage)
    if planned.profile is not None and not plan.computes:
        note("warning: --profile has no effect: the plan computes no weights")
    job = Job("apply", stage, opened, to.at(opened.path, output_label(plan)), printing)
    path = planned.profile or (Path(stage.profile) if stage.profile else None)
    application = Application(plan, opened, job.output, path, planned.device, [planned.plan], planned.clock)
    show_result(job, applied_result(application, dry_run=to.dry_run), dry_run=to.dry_run)
