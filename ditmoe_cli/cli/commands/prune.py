"""``ditmoe prune``: fewer experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, cast, get_args

import typer

from ditmoe_cli.cli.calibration_options import AutomaticProfile
from ditmoe_cli.cli.groups import at_least, known, one_of, refuse_idle, seed_of_64_bits
from ditmoe_cli.cli.options import Destination, Models, Planning, Refitting, Source
from ditmoe_cli.cli.planning import print_methods, run_planner
from ditmoe_cli.cli.terminal import Printing
from ditmoe_cli.compression.counts import parse_keep
from ditmoe_cli.compression.methods import METHODS
from ditmoe_cli.compression.plan import Repair, RouterMode
from ditmoe_cli.compression.prune.pruning import Pruning
from ditmoe_cli.compression.prune.widths import widths_of_ratio
from ditmoe_cli.errors import UsageError

MACHINE = Models
EXAMPLES = (
    "ditmoe prune ckpt.pt --keep 0.5",
    "ditmoe prune ckpt.pt --keep 4 --router slice -o sliced.safetensors",
    "ditmoe prune ckpt.pt --neurons 0.5 --allocate global --dry-run",
)


@dataclass(frozen=True)
class Dropping:
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
class Narrowing:
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
class Replacing(Refitting):
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

    def repair(self, router: str) -> Repair | None:
        """Return how to refit or scale, or None for neither. Raises `UsageError` for --scale with --no-refit."""
        if self.scale and not self.refit:
            raise UsageError("--scale is a repair; leave out --no-refit")
        scaling = Repair(scale=True, shared=False, constant=False, linear=False, tokens=self.refit_tokens)
        return scaling if self.scale else super().repair(router)


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


def pruning_of(dropping: Dropping, narrowing: Narrowing, replacing: Replacing) -> Pruning:
    """Return what to prune. Raises `UsageError` for unknown names and values out of range."""
    keep = "1.0" if dropping.keep is None and narrowing.neurons != 1.0 else dropping.keep
    if keep is None:
        raise UsageError(
            "--keep is missing: give a ratio such as 0.5 or a count such as 4, or --neurons to narrow only"
        )
    widths_of_ratio(narrowing.multiple, narrowing.neurons, narrowing.multiple)  # refuses what is out of range
    refuse_idle_options(dropping, narrowing, replacing)
    return Pruning(
        keep=parse_keep(keep),
        method=dropping.method,
        router=None if dropping.router == "auto" else cast(RouterMode, dropping.router),
        seed=dropping.seed,
        repair=replacing.repair(dropping.router),
        shared_budget=dropping.allocate == "global",
        neurons=narrowing.neurons,
        multiple=narrowing.multiple,
        narrow_shared=narrowing.narrow_shared,
        constants=replacing.constants or replacing.residual_rank > 0,
        rank=replacing.residual_rank,
    )


def refuse_idle_options(dropping: Dropping, narrowing: Narrowing, replacing: Replacing) -> None:
    """Raise `UsageError` for an option that has no effect beside the others."""
    if dropping.keep is None:
        refuse_idle(dropping, "without --keep, since all experts stay", "method", "seed", "router")
        refuse_idle(replacing, "without --keep, since all experts stay", "constants", "residual_rank")
    if dropping.method != "random":
        refuse_idle(dropping, "without --method random", "seed")
    if narrowing.neurons == 1.0:
        refuse_idle(narrowing, "without --neurons", "multiple", "narrow_shared")
