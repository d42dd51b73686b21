"""``ditmoe apply``: carry out a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api.plan_application import Application, applied_result, output_label
from ditmoe_cli.api.devices import checked_device
from ditmoe_cli.api.earlier_results import made_before, require_clock
from ditmoe_cli.api.output_names import usual_profiles
from ditmoe_cli.api.planner_runs import Choice, foresee, found_again, unread, write
from ditmoe_cli.cli.options import Destination, DeviceOpt, Source
from ditmoe_cli.cli.planning import Job, show_result
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing, note
from ditmoe_cli.compression.plan import read_plan
from ditmoe_cli.cli.training import parse_clock_numbers
from ditmoe_cli.compression.output import check_plan
from ditmoe_cli.compression.plan import CompressionPlan, read_plan
from ditmoe_cli.compression.recorded import request_of
from ditmoe_cli.errors import UsageError
from ditmoe_cli.files.fingerprint import file_digest
from ditmoe_cli.files.staging import check_target
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.profile import read_profile
from ditmoe_cli.routing.profile_search import kept_name

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
    clock: Annotated[
        tuple[int, ...] | None,
        typer.Option(
            "--clock",
            metavar="LIST",
            parser=parse_clock_numbers,
            help="What the clock chose in an earlier run of a plan that trains, as its recipe has it.",
        ),
    ] = None
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
    application = Application(plan, opened, job.output, path, planned.device, [planned.plan])
    show_result(job, applied_result(application, dry_run=to.dry_run), dry_run=to.dry_run)
    if path is None and not to.dry_run:
        path = profile_of_plan(opened, plan, job.output.path.parent)
    beside = [planned.plan, *([path] if path is not None else [])]
    check_target(job.output.path, True, [opened.path, *beside])  # whether it exists is another matter
    if not plan.computes and not to.dry_run:
        job = replace(job, checkpoint=unread(opened, job.output, plan.source))
    check_plan(job.checkpoint, plan)
    if planned.clock is not None and (plan.retraining is None or plan.retraining.minutes is None):
        raise UsageError("--clock has no effect on a plan that trains nothing by the clock")
    made = made_before(job.output, job.checkpoint, request_of(plan), plan)
    if made is not None:
        require_clock(made, planned.clock)
        profile_path = path if plan.computes else None
        found = found_again(job.checkpoint, job.output, made, profile_path, plan, dry_run=to.dry_run)
        return show_written(job, found, dry_run=to.dry_run)
    if to.dry_run:
        return show_foreseen(job, foresee(job.checkpoint, job.output, plan, planned.device))
    profile = read_profile(path) if path and plan.computes else None
    device = checked_device(planned.device)
    return show_written(
        job, write(job.checkpoint, job.output, Choice(plan, profile, clock=planned.clock), lambda: device)
    )

def profile_of_plan(checkpoint: Checkpoint, plan: CompressionPlan, beside: Path) -> Path | None:
    """Return the profile that the plan was made with, under a usual name, or that of a planner's own in `beside`.
    None where none is needed, or there.
    """
    if not plan.computes or plan.profile is None:
        return None
    paths = (*usual_profiles(checkpoint), beside / kept_name(checkpoint, plan.source))
    path = next((p for p in paths if p.is_file() and file_digest(p) == plan.profile), None)
    if path is not None:
        note(f"using the profile {path}, which the plan was made with")
    return path
