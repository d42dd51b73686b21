"""``ditmoe merge``: several experts made into one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ditmoe_cli.cli.options import (
    CheckpointArg,
    Device,
    DryRun,
    Force,
    Heads,
    Json,
    OutputOpt,
    ProfileOpt,
    Quiet,
    RefitOpt,
    RefitTokensOpt,
    SamplerOpt,
    ShardSize,
    TopK,
    checked_device,
    given,
    parse_repair,
)
from ditmoe_cli.cli.output import Printing, emit, note, progress
from ditmoe_cli.cli.stage import Stage, default_output, incoming, open_stage
from ditmoe_cli.cli.writing import preview, write
from ditmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from ditmoe_cli.compression.merge.planner import Merging
    from ditmoe_cli.compression.plan import CompressionPlan
    from ditmoe_cli.model.checkpoint import Checkpoint
    from ditmoe_cli.routing.profile import RoutingProfile

GroupsOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--groups", metavar="R|N", help="Experts each block is left with: a ratio as 0.5, or a count as 4."),
]
MethodOpt = Annotated[str, typer.Option("--method", metavar="NAME", help="Grouping and merging; see --list-methods.")]
RouterOpt = Annotated[
    str,
    typer.Option(
        "--router",
        metavar="map|slice",
        help="map: all rows stay, and routing weights of merged experts add; slice: one row a group (loads upstream).",
    ),
]
ListOpt = Annotated[bool, typer.Option("--list-methods", help="Print the methods with their sources, and stop.")]


def run(
    checkpoint: CheckpointArg = None,
    groups: GroupsOpt = None,
    method: MethodOpt = "m-smoe",
    router: RouterOpt = "map",
    profile: ProfileOpt = None,
    refit: RefitOpt = True,
    refit_tokens: RefitTokensOpt = 0,
    list_methods: ListOpt = False,
    device: Device = "cpu",
    heads: Heads = None,
    top_k: TopK = None,
    sampler: SamplerOpt = None,
    output: OutputOpt = None,
    force: Force = False,
    dry_run: DryRun = False,
    max_shard_size: ShardSize = "10GB",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge each block's experts into fewer.

    Needs a routing profile: the one in the envelope or --profile; else the checkpoint is profiled first.
    """
    if list_methods:
        return print_methods(Printing(json))
    merging = parse_merging(groups, method, router, refit, refit_tokens)
    stage = incoming(checkpoint, given(heads, top_k, sampler))
    opened = open_stage(stage)
    target = output or default_output(opened.path, f"merge-groups{groups}")
    plan, used = choose(stage, opened, merging, profile, dry_run, target, device, force)
    printing = Printing(json, quiet)
    if dry_run:
        return preview(stage, opened, plan, target, force, max_shard_size, printing, decided=plan.decided)
    details = merged_details(opened, plan)
    return write(stage, "merge", opened, plan, target, force, max_shard_size, printing, details, used, device)


def print_methods(printing: Printing) -> None:
    """Print each method with what it does and where it comes from."""
    from ditmoe_cli.compression.merge.methods import METHODS

    result = {name: {"summary": method.summary, "source": method.source} for name, method in METHODS.items()}
    rows = [(name, f"{method.summary} ({method.source})") for name, method in METHODS.items()]
    emit(printing, Stage().to_json({"methods": result}), rows, None)


def parse_merging(groups: str | None, method: str, router: str, refit: bool, tokens: int) -> Merging:
    """Return what to merge. Raises `UsageError` for unknown names and values out of range."""
    from ditmoe_cli.compression.merge.methods import METHODS
    from ditmoe_cli.compression.merge.planner import Merging
    from ditmoe_cli.compression.prune.planner import parse_keep

    if groups is None:
        raise UsageError("--groups is missing: give a ratio such as 0.5 or a count such as 4")
    if method not in METHODS:
        raise UsageError(f"--method {method}: unknown; choose {', '.join(METHODS)}")
    if router not in ("map", "slice"):
        raise UsageError(f"--router {router}: choose map or slice")
    repair = parse_repair(refit, tokens, router)
    return Merging(parse_keep(groups, "--groups"), method, "slice" if router == "slice" else "ghost", repair)


def choose(
    stage: Stage,
    checkpoint: Checkpoint,
    merging: Merging,
    profile: Path | None,
    dry_run: bool,
    target: Path,
    device: str,
    force: bool,
) -> tuple[CompressionPlan, RoutingProfile | None]:
    """Return the plan and the profile it rests on, profiling the checkpoint where that is needed.

    A dry run never profiles: without a profile its plan is undecided.
    """
    from ditmoe_cli.checkpoint.staging import check_target
    from ditmoe_cli.compression.merge.planner import group_counts, plan_merge, undecided_merge
    from ditmoe_cli.routing.calibrate import usable_profile, valid_profile

    group_counts(checkpoint, merging)
    given_profile = profile or (Path(stage.profile) if stage.profile else None)
    if dry_run:
        found = usable_profile(checkpoint, given_profile)
        return (
            plan_merge(checkpoint, found, merging, progress) if found else undecided_merge(checkpoint, merging)
        ), found
    read = [given_profile] if given_profile and given_profile.is_file() else []
    check_target(target.absolute(), force, [checkpoint.path, *read])
    beside = target.absolute().parent
    found = valid_profile(checkpoint, given_profile, beside, lambda: checked_device(device), progress, note)
    return plan_merge(checkpoint, found, merging, progress), found


def merged_details(checkpoint: Checkpoint, plan: CompressionPlan) -> dict[str, Any]:
    """Return what a merge did, for the result."""
    groups = [
        [[lead, *(e for e, into in block.merged if into == lead)] for lead in block.keep] for block in plan.blocks
    ]
    return {
        "experts_before": [len(block.expert_widths) for block in checkpoint.config.blocks],
        "groups": groups,
        "method": plan.merging,
        "router": plan.options["router"],
    }
