"""``ditmoe prune``: fewer experts."""

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
    Quiet,
    SamplerOpt,
    ShardSize,
    TopK,
    checked_device,
    given,
)
from ditmoe_cli.cli.output import Printing, emit, note, progress
from ditmoe_cli.cli.stage import Stage, default_output, incoming, open_stage
from ditmoe_cli.cli.writing import preview, write
from ditmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from ditmoe_cli.compression.plan import CompressionPlan
    from ditmoe_cli.compression.prune.planner import Pruning
    from ditmoe_cli.model.checkpoint import Checkpoint
    from ditmoe_cli.routing.profile import RoutingProfile

KeepOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--keep", metavar="R|N", help="Experts kept per block: a ratio as 0.5 or 1.0, or a count as 4."),
]
MethodOpt = Annotated[str, typer.Option("--method", metavar="NAME", help="Saliency; see --list-methods.")]
RouterOpt = Annotated[
    str,
    typer.Option(
        "--router",
        metavar="slice|ghost",
        help="slice: delete router rows (loads upstream); ghost: keep them in the softmax, so that the routing "
        "weights of the kept experts stay exact.",
    ),
]
ProfileOpt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--profile", metavar="FILE", help="Profile to choose by. [default: the envelope's, else a new one]"),
]
SeedOpt = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of --method random.")]
ListOpt = Annotated[bool, typer.Option("--list-methods", help="Print the methods with their sources, and stop.")]


def run(
    checkpoint: CheckpointArg = None,
    keep: KeepOpt = None,
    method: MethodOpt = "reap",
    router: RouterOpt = "ghost",
    profile: ProfileOpt = None,
    seed: SeedOpt = 0,
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
    """Keep each block's most salient experts.

    Needs a routing profile: the one in the envelope or --profile; else the checkpoint is profiled first.
    """
    if list_methods:
        return print_methods(Printing(json))
    pruning = parse_pruning(keep, method, router, seed)
    stage = incoming(checkpoint, given(heads, top_k, sampler))
    opened = open_stage(stage)
    target = output or default_output(opened.path, f"prune-keep{keep}")
    plan, used = choose(stage, opened, pruning, profile, dry_run, target, device, force)
    if dry_run:
        return preview(stage, opened, plan, target, force, max_shard_size, Printing(json, quiet), decided=plan.decided)
    details = pruned_details(opened, plan)
    return write(stage, "prune", opened, plan, target, force, max_shard_size, Printing(json, quiet), details, used)


def print_methods(printing: Printing) -> None:
    """Print each method with what it measures and where it comes from."""
    from ditmoe_cli.compression.prune.methods import METHODS

    result = {name: {"summary": method.summary, "source": method.source} for name, method in METHODS.items()}
    rows = [(name, f"{method.summary} ({method.source})") for name, method in METHODS.items()]
    emit(printing, Stage().to_json({"methods": result}), rows, None)


def parse_pruning(keep: str | None, method: str, router: str, seed: int) -> Pruning:
    """Return what to prune. Raises `UsageError` for unknown names and values out of range."""
    from ditmoe_cli.compression.prune.methods import METHODS
    from ditmoe_cli.compression.prune.planner import Pruning, parse_keep

    if keep is None:
        raise UsageError("--keep is missing: give a ratio such as 0.5 or a count such as 4")
    if method not in METHODS:
        raise UsageError(f"--method {method}: unknown; choose {', '.join(METHODS)}")
    if router not in ("slice", "ghost"):
        raise UsageError(f"--router {router}: choose slice or ghost")
    return Pruning(parse_keep(keep), method, "slice" if router == "slice" else "ghost", seed)


def choose(
    stage: Stage,
    checkpoint: Checkpoint,
    pruning: Pruning,
    profile: Path | None,
    dry_run: bool,
    target: Path,
    device: str,
    force: bool,
) -> tuple[CompressionPlan, RoutingProfile | None]:
    """Return the plan and the profile it rests on, profiling the checkpoint where that is needed.

    What cannot work is refused before the first expensive step. A dry run never profiles: without a profile its
    plan is undecided.
    """
    from ditmoe_cli.checkpoint.staging import check_target
    from ditmoe_cli.compression.prune.methods import METHODS
    from ditmoe_cli.compression.prune.planner import kept_counts, plan_prune, undecided_plan
    from ditmoe_cli.routing.calibrate import usable_profile, valid_profile

    kept_counts(checkpoint, pruning.keep)
    given_profile = profile or (Path(stage.profile) if stage.profile else None)
    if not METHODS[pruning.method].needs_profile:
        return plan_prune(checkpoint, None, pruning), None
    if dry_run:
        found = usable_profile(checkpoint, given_profile)
        return (plan_prune(checkpoint, found, pruning) if found else undecided_plan(checkpoint, pruning)), found
    read = [given_profile] if given_profile and given_profile.is_file() else []
    check_target(target.absolute(), force, [checkpoint.path, *read])
    beside = target.absolute().parent
    found = valid_profile(checkpoint, given_profile, beside, lambda: checked_device(device), progress, note)
    for block, expert in found.never_routed():
        note(f"warning: no calibration token chose expert {expert} of block {block}; its saliency counts as 0")
    return plan_prune(checkpoint, found, pruning), found


def pruned_details(checkpoint: Checkpoint, plan: CompressionPlan) -> dict[str, Any]:
    """Return what a prune did, for the result."""
    return {
        "experts_before": [len(block.expert_widths) for block in checkpoint.config.blocks],
        "kept": [list(block.keep) for block in plan.blocks],
        **{name: plan.options[name] for name in ("method", "router")},
    }
