"""``ditmoe prune``: fewer experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, get_args

import typer

from ditmoe_cli.api import pruning_requests as asked
from ditmoe_cli.api.argument_checks import at_least, known, one_of, seed_of_64_bits
from ditmoe_cli.api.pruning_requests import pruning_of
from ditmoe_cli.cli.calibration_options import AutomaticProfile
from ditmoe_cli.cli.options import Destination, Models, Planning, Refitting, Source
from ditmoe_cli.cli.planning import print_methods, run_planner
from ditmoe_cli.cli.terminal import Printing
from ditmoe_cli.compression.methods import METHODS
from ditmoe_cli.compression.plan import RouterMode

MACHINE = Models
EXAMPLES = (
    "ditmoe prune ckpt.pt --keep 0.5",
    "ditmoe prune ckpt.pt --keep 4 --router slice -o sliced.safetensors",
    "ditmoe prune ckpt.pt --neurons 0.5 --allocate global --dry-run",
)


@dataclass(frozen=True)
class Dropping(asked.Dropping):
    """Which experts are kept, and how routers go on."""

    panel: ClassVar[str] = "Choice of experts"

    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            metavar="R|N|auto",
            help="Experts to keep in each block: a ratio as 0.5 or 1.0, a count as 4, or auto: all that --neurons "
            "leaves a neuron.",
        ),
    ] = None
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            callback=known(*METHODS["prune"]),
            help="Saliency or search by which experts are chosen; see --list-methods.",
        ),
    ] = "reap"
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", callback=seed_of_64_bits, help="Seed of --method random.")
    ] = 0
    router: Annotated[
        str,
        typer.Option(
            "--router",
            metavar="MODE",
            callback=one_of("auto", *get_args(RouterMode)),
            help="slice: delete the rows of dropped experts (loads upstream); ghost: keep them in the softmax, so that "
            "the routing weights of kept experts stay exact; mass: ghost, with weights rescaled to the sum of the full "
            "top-k; auto: in each block the mode of least replayed error.",
        ),
    ] = "ghost"
    allocate: Annotated[
        str,
        typer.Option(
            "--allocate",
            metavar="uniform|global",
            callback=one_of("uniform", "global"),
            help="uniform: the same share in each block; global: blocks share one budget of experts by replayed error, "
            "and one of neurons by energy.",
        ),
    ] = "uniform"


@dataclass(frozen=True)
class Narrowing(asked.Narrowing):
    """How kept experts are narrowed."""

    panel: ClassVar[str] = "Narrowing"

    neurons: Annotated[
        float,
        typer.Option("--neurons", metavar="R", help="Share of the kept experts' neurons to keep (CAMERA)."),
    ] = 1.0
    multiple: Annotated[
        int, typer.Option("--multiple", metavar="N", help="Number that narrowed widths are multiples of.")
    ] = 64
    narrow_shared: Annotated[bool, typer.Option("--narrow-shared", help="Narrow the shared expert too.")] = False


@dataclass(frozen=True)
class Replacing(asked.Replacing, Refitting):
    """Repairs and replacements of dropped experts."""

    scale: Annotated[
        bool, typer.Option("--scale", help="Fit one factor for the output of each kept expert, instead of refitting.")
    ] = False
    constants: Annotated[
        bool, typer.Option("--constants", help="Replace each dropped expert by a constant output.")
    ] = False
    residual_rank: Annotated[
        int,
        typer.Option(
            "--residual-rank",
            metavar="R",
            callback=at_least(0),
            help="Replace each dropped expert by a constant and a linear map of rank R.",
        ),
    ] = 0


def run(
    dropping: Dropping,
    narrowing: Narrowing,
    replacing: Replacing,
    planning: Planning,
    automatic: AutomaticProfile,
    source: Source,
    to: Destination,
    printing: Printing,
) -> None:
    """Keep the most salient experts of each block.

    Takes the routing profile of --profile, of the pipe, or beside the checkpoint; without one it is profiled first.
    """
    if planning.list_methods:
        return print_methods("prune", printing)
    return run_planner(pruning_of(dropping, narrowing, replacing), planning, automatic, source, to, printing)
