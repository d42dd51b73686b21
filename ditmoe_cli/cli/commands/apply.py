"""``ditmoe apply``: carry out a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ditmoe_cli.cli.options import (
    CheckpointArg,
    Device,
    DryRun,
    Force,
    Heads,
    Json,
    OutputOpt,
    Quiet,
    SamplerOpt,
    ShardSize,
    TopK,
    checked_device,
    given,
)
from ditmoe_cli.cli.planning import Job, Means, Target, preview, write
from ditmoe_cli.cli.stage import incoming, open_stage
from ditmoe_cli.cli.terminal import Printing

PlanOpt = Annotated[Path, typer.Option("--plan", metavar="FILE", help="A plan, or the output of a --dry-run.")]

PlansProfile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--profile", metavar="FILE", help="Profile that the plan was made with, where weights are computed from it."
    ),
]


def run(
    plan: PlanOpt,
    checkpoint: CheckpointArg = None,
    heads: Heads = None,
    top_k: TopK = None,
    sampler: SamplerOpt = None,
    output: OutputOpt = None,
    force: Force = False,
    dry_run: DryRun = False,
    profile: PlansProfile = None,
    device: Device = "cpu",
    max_shard_size: ShardSize = "10GB",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Carry out a compression plan.

    The plan may have been edited; the checkpoint must be the one that it was made for. A plan that computes weights
    (refitting, merging, narrowing) takes the profile that it was made with.
    """
    from ditmoe_cli.compression.plan import read_plan
    from ditmoe_cli.routing.profile import read_profile

    wanted = read_plan(plan)
    stage = incoming(checkpoint, given(heads, top_k, sampler))
    opened = open_stage(stage)
    target = Target(output, force, max_shard_size, dry_run).output(opened, wanted.command)
    job = Job("apply", stage, opened, target, Printing(json, quiet))
    if dry_run:
        return preview(job, wanted)
    named = Means(profile, device).profile_for(stage)
    used = read_profile(named) if named and wanted.computes else None
    place = checked_device(device)
    return write(job, wanted, used, lambda: place)
