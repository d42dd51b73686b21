"""``ditmoe merge``: several experts made into one."""

from __future__ import annotations

from dataclasses import asdict
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
    given,
    parse_repair,
)
from ditmoe_cli.cli.planning import preview, print_methods, valid_profile_for, write
from ditmoe_cli.cli.stage import Stage, default_output, incoming, open_stage
from ditmoe_cli.cli.terminal import Printing, progress
from ditmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from ditmoe_cli.compression.merge.merging import Merging
    from ditmoe_cli.compression.plan import CompressionPlan, Delta
    from ditmoe_cli.model.opened import Checkpoint
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
DeltaOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--delta",
        metavar="svd|ternary",
        help="In place of --groups: all experts stay, stored as their mean and compressed differences from it.",
    ),
]
DeltaRatioOpt = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--delta-ratio",
        metavar="R",
        help="svd: weights of a difference's factors over those of its matrix; ternary: share of entries other than "
        "0. [default: 0.25 and 0.5]",
    ),
]
ListOpt = Annotated[bool, typer.Option("--list-methods", help="Print the methods with their sources, and stop.")]


def run(
    checkpoint: CheckpointArg = None,
    groups: GroupsOpt = None,
    method: MethodOpt = "m-smoe",
    router: RouterOpt = "map",
    delta: DeltaOpt = None,
    delta_ratio: DeltaRatioOpt = None,
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
    """Merge each block's experts into fewer, or store them as differences.

    Needs a routing profile: the one in the envelope or --profile; else the checkpoint is profiled first.
    """
    if list_methods:
        from ditmoe_cli.compression.merge.merge_methods import METHODS

        return print_methods(METHODS, Printing(json))
    wanted = parse_delta(delta, delta_ratio, groups) or parse_merging(groups, method, router, refit, refit_tokens)
    stage = incoming(checkpoint, given(heads, top_k, sampler))
    opened = open_stage(stage)
    target = output or default_output(opened.path, suffix(wanted))
    plan, used = choose(stage, opened, wanted, profile, dry_run, target, device, force)
    printing = Printing(json, quiet)
    if dry_run:
        return preview(stage, opened, plan, target, force, max_shard_size, printing, decided=plan.decided)
    details = merged_details(opened, plan)
    return write(stage, "merge", opened, plan, target, force, max_shard_size, printing, details, used, device)


def parse_merging(groups: str | None, method: str, router: str, refit: bool, tokens: int) -> Merging:
    """Return what to merge. Raises `UsageError` for unknown names and values out of range."""
    from ditmoe_cli.compression.merge.merge_methods import METHODS
    from ditmoe_cli.compression.merge.merging import Merging
    from ditmoe_cli.compression.prune.pruning import parse_keep

    if groups is None:
        raise UsageError("--groups is missing: give a ratio such as 0.5 or a count such as 4, or --delta in its place")
    if method not in METHODS:
        raise UsageError(f"--method {method}: unknown; choose {', '.join(METHODS)}")
    if router not in ("map", "slice"):
        raise UsageError(f"--router {router}: choose map or slice")
    repair = parse_repair(refit, tokens, router)
    return Merging(parse_keep(groups, "--groups"), method, "slice" if router == "slice" else "ghost", repair)


def parse_delta(kind: str | None, ratio: float | None, groups: str | None) -> Delta | None:
    """Return how to store differences, None where that is not asked for. Raises `UsageError`."""
    from ditmoe_cli.compression.delta.delta_plan import DEFAULT_RATIOS
    from ditmoe_cli.compression.plan import Delta

    if kind is None:
        if ratio is not None:
            raise UsageError("--delta-ratio needs --delta svd or --delta ternary")
        return None
    if groups is not None:
        raise UsageError("--groups and --delta exclude each other: differences leave every expert in its place")
    known = next((name for name in DEFAULT_RATIOS if name == kind), None)
    if known is None:
        raise UsageError(f"--delta {kind}: choose {' or '.join(DEFAULT_RATIOS)}")
    chosen = DEFAULT_RATIOS[known] if ratio is None else ratio
    if not 0.0 < chosen <= 1.0:
        raise UsageError(f"--delta-ratio {chosen}: give a number above 0 and at most 1.0")
    return Delta(known, chosen)


def suffix(wanted: Merging | Delta) -> str:
    """Return what the default output's name ends in."""
    from ditmoe_cli.compression.plan import Delta

    return f"merge-{wanted.kind}{wanted.ratio:g}" if isinstance(wanted, Delta) else f"merge-groups{wanted.groups}"


def check(checkpoint: Checkpoint, wanted: Merging | Delta) -> None:
    """Refuse what cannot be done to the checkpoint, before it is profiled."""
    from ditmoe_cli.compression.block_layout import require_plain
    from ditmoe_cli.compression.delta.delta_sizes import delta_tensors
    from ditmoe_cli.compression.merge.merging import group_counts
    from ditmoe_cli.compression.plan import Delta

    if isinstance(wanted, Delta):
        delta_tensors(checkpoint, wanted)
    else:
        group_counts(checkpoint, wanted)
        require_plain(checkpoint)


def planned(checkpoint: Checkpoint, wanted: Merging | Delta, profile: RoutingProfile | None) -> CompressionPlan:
    """Return the plan; without a profile an undecided one."""
    from ditmoe_cli.compression.delta.delta_plan import plan_delta
    from ditmoe_cli.compression.merge.merging import plan_merge, undecided_merge
    from ditmoe_cli.compression.plan import Delta

    if isinstance(wanted, Delta):
        return plan_delta(checkpoint, wanted, profile)
    return plan_merge(checkpoint, profile, wanted, progress) if profile else undecided_merge(checkpoint, wanted)


def choose(
    stage: Stage,
    checkpoint: Checkpoint,
    wanted: Merging | Delta,
    profile: Path | None,
    dry_run: bool,
    target: Path,
    device: str,
    force: bool,
) -> tuple[CompressionPlan, RoutingProfile | None]:
    """Return the plan and the profile it rests on, profiling the checkpoint where that is needed.

    A dry run never profiles: without a profile its plan is undecided.
    """
    from ditmoe_cli.routing.calibrate import usable_profile

    check(checkpoint, wanted)
    given_profile = profile or (Path(stage.profile) if stage.profile else None)
    if dry_run:
        found = usable_profile(checkpoint, given_profile)
        return planned(checkpoint, wanted, found), found
    found = valid_profile_for(checkpoint, given_profile, target, device, force)
    return planned(checkpoint, wanted, found), found


def merged_details(checkpoint: Checkpoint, plan: CompressionPlan) -> dict[str, Any]:
    """Return what a merge did, for the result."""
    if plan.delta is not None:
        return {"delta": asdict(plan.delta)}
    groups = [
        [[lead, *(e for e, into in block.merged if into == lead)] for lead in block.keep] for block in plan.blocks
    ]
    return {
        "experts_before": [len(block.expert_widths) for block in checkpoint.config.blocks],
        "groups": groups,
        "method": plan.merging,
        "router": plan.options["router"],
    }
