"""``ditmoe merge``: several experts made into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

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
from ditmoe_cli.cli.planning import Means, Target, print_methods, run_planner
from ditmoe_cli.cli.stage import incoming, open_stage
from ditmoe_cli.cli.terminal import Printing
from ditmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from ditmoe_cli.compression.delta.delta_plan import Differencing
    from ditmoe_cli.compression.merge.merging import Merging

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
    planner = parse_delta(delta, delta_ratio, groups) or parse_merging(groups, method, router, refit, refit_tokens)
    stage = incoming(checkpoint, given(heads, top_k, sampler))
    target = Target(output, force, max_shard_size, dry_run)
    return run_planner(planner, stage, open_stage(stage), target, Means(profile, device), Printing(json, quiet))


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


def parse_delta(kind: str | None, ratio: float | None, groups: str | None) -> Differencing | None:
    """Return how to store differences, None where that is not asked for. Raises `UsageError`."""
    from ditmoe_cli.compression.delta.delta_plan import DEFAULT_RATIOS, Differencing
    from ditmoe_cli.compression.plan import Differences

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
    return Differencing(Differences(known, chosen))
