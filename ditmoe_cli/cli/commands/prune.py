"""``ditmoe prune``: fewer experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast, get_args

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
    from ditmoe_cli.compression.prune.pruning import Pruning

KeepOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--keep",
        metavar="R|N|auto",
        help="Experts kept per block: a ratio as 0.5 or 1.0, a count as 4, or auto: those that --neurons leaves any.",
    ),
]
MethodOpt = Annotated[str, typer.Option("--method", metavar="NAME", help="Saliency; see --list-methods.")]
RouterOpt = Annotated[
    str,
    typer.Option(
        "--router",
        metavar="MODE",
        help="slice: delete router rows (loads upstream); ghost: keep them in the softmax, so that the routing "
        "weights of the kept experts stay exact; mass: ghost, rescaled to the mass of the full top-k; auto: each "
        "block's of least replayed error.",
    ),
]
ScaleOpt = Annotated[
    bool, typer.Option("--scale", help="Instead of refitting, fit a factor for each kept expert's output.")
]
AllocateOpt = Annotated[
    str,
    typer.Option(
        "--allocate",
        metavar="uniform|global",
        help="global: blocks share the experts by replayed error, and the experts of all blocks the neurons by energy.",
    ),
]
NeuronsOpt = Annotated[
    float, typer.Option("--neurons", metavar="R", help="Share of the kept experts' neurons to keep (CAMERA).")
]
MultipleOpt = Annotated[int, typer.Option("--multiple", metavar="N", help="What narrowed widths are multiples of.")]
NarrowSharedOpt = Annotated[bool, typer.Option("--narrow-shared", help="Narrow the shared expert too.")]
ConstantsOpt = Annotated[bool, typer.Option("--constants", help="Put a constant in each dropped expert's place.")]
RankOpt = Annotated[
    int, typer.Option("--residual-rank", metavar="R", help="Put a linear map of rank R in each dropped expert's place.")
]
SeedOpt = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of --method random.")]
ListOpt = Annotated[bool, typer.Option("--list-methods", help="Print the methods with their sources, and stop.")]


def run(
    checkpoint: CheckpointArg = None,
    keep: KeepOpt = None,
    method: MethodOpt = "reap",
    router: RouterOpt = "ghost",
    profile: ProfileOpt = None,
    refit: RefitOpt = True,
    refit_tokens: RefitTokensOpt = 0,
    scale: ScaleOpt = False,
    allocate: AllocateOpt = "uniform",
    neurons: NeuronsOpt = 1.0,
    multiple: MultipleOpt = 64,
    narrow_shared: NarrowSharedOpt = False,
    constants: ConstantsOpt = False,
    residual_rank: RankOpt = 0,
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
        from ditmoe_cli.compression.prune.prune_methods import METHODS, REPLAYED

        return print_methods({**METHODS, **REPLAYED}, Printing(json))
    pruning = replace(
        parse_pruning("1.0" if keep is None and neurons != 1.0 else keep, method, router, seed),
        repair=parse_repair(refit, refit_tokens, router, scale),
        shared_budget=parse_allocation(allocate),
        label=default_name(keep, neurons),
        **parse_replacement(neurons, multiple, narrow_shared, constants, residual_rank),
    )
    stage = incoming(checkpoint, given(heads, top_k, sampler))
    target = Target(output, force, max_shard_size, dry_run)
    return run_planner(pruning, stage, open_stage(stage), target, Means(profile, device), Printing(json, quiet))


def parse_allocation(text: str) -> bool:
    """Return whether blocks share a budget."""
    if text not in ("uniform", "global"):
        raise UsageError(f"--allocate {text}: choose uniform or global")
    return text == "global"


def parse_replacement(neurons: float, multiple: int, shared: bool, constants: bool, rank: int) -> dict[str, Any]:
    """Return how experts that stay are narrowed, and what stands in for those that go."""
    from ditmoe_cli.compression.prune.widths import widths_of_ratio

    widths_of_ratio(multiple, neurons, multiple)  # refuses what is out of range
    if rank < 0:
        raise UsageError(f"--residual-rank {rank}: must be at least 0")
    named = {"neurons": neurons, "multiple": multiple, "narrow_shared": shared}
    return {**named, "constants": constants or rank > 0, "rank": rank}


def default_name(keep: str | None, neurons: float) -> str:
    """Return what the output is called after the input."""
    parts = ("prune", f"keep{keep}" if keep is not None else "", f"neurons{neurons}" if neurons != 1.0 else "")
    return "-".join(filter(None, parts))


def parse_pruning(keep: str | None, method: str, router: str, seed: int) -> Pruning:
    """Return what to prune. Raises `UsageError` for unknown names and values out of range."""
    from ditmoe_cli.compression.plan import RouterMode
    from ditmoe_cli.compression.prune.prune_methods import METHODS, REPLAYED
    from ditmoe_cli.compression.prune.pruning import Pruning, parse_keep

    if keep is None:
        raise UsageError(
            "--keep is missing: give a ratio such as 0.5 or a count such as 4, or --neurons to narrow only"
        )
    if method not in (*METHODS, *REPLAYED):
        raise UsageError(f"--method {method}: unknown; choose {', '.join((*METHODS, *REPLAYED))}")
    if router not in ("auto", *get_args(RouterMode)):
        raise UsageError(f"--router {router}: choose auto, {', '.join(get_args(RouterMode))}")
    return Pruning(parse_keep(keep), method, None if router == "auto" else cast(RouterMode, router), seed)
