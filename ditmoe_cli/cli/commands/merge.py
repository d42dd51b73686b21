"""``ditmoe merge``: several experts made into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, cast

import typer

from ditmoe_cli.cli.calibration_options import AutomaticProfile
from ditmoe_cli.cli.groups import known, one_of, refuse_idle
from ditmoe_cli.cli.options import Destination, Models, Planning, Refitting, Source
from ditmoe_cli.cli.planning import print_methods, run_planner
from ditmoe_cli.cli.terminal import Printing
from ditmoe_cli.compression.counts import parse_keep
from ditmoe_cli.compression.delta.delta_plan import DEFAULT_RATIOS, Differencing
from ditmoe_cli.compression.merge.merging import Merging
from ditmoe_cli.compression.methods import MERGES
from ditmoe_cli.compression.plan import Differences
from ditmoe_cli.errors import UsageError
from ditmoe_cli.formats.differences import DeltaFormat

MACHINE = Models
EXAMPLES = (
    "ditmoe merge ckpt.pt --groups 4",
    "ditmoe merge ckpt.pt --delta svd --delta-ratio 0.25",
)


@dataclass(frozen=True)
class Grouping:
    """How experts are merged."""

    panel: ClassVar[str] = "Merging"

    groups: Annotated[
        str | None,
        typer.Option(
            "--groups", metavar="R|N", help="Experts to merge each block into: a ratio as 0.5, or a count as 4."
        ),
    ] = None
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            callback=known(*MERGES),
            help="How experts are grouped and merged; see --list-methods.",
        ),
    ] = "m-smoe"
    router: Annotated[
        str,
        typer.Option(
            "--router",
            metavar="map|slice",
            callback=one_of("map", "slice"),
            help="map: keep all rows, so that routing weights of merged experts add; slice: keep one row a group "
            "(loads upstream).",
        ),
    ] = "map"


def delta_ratio(ratio: float) -> float:
    """Return a ratio that is above 0 and at most 1. Raises `ValueError` for any other."""
    if not 0.0 < ratio <= 1.0:
        raise ValueError("give a number above 0 and at most 1.0")
    return ratio


@dataclass(frozen=True)
class DeltaOptions:
    """How experts are stored as differences."""

    panel: ClassVar[str] = "Differences"

    delta: Annotated[
        str | None,
        typer.Option(
            "--delta",
            metavar="svd|ternary",
            callback=one_of(*DEFAULT_RATIOS),
            help="Keep all experts, stored as their mean and compressed differences from it; replaces --groups.",
        ),
    ] = None
    delta_ratio: Annotated[
        float | None,
        typer.Option(
            "--delta-ratio",
            metavar="R",
            callback=delta_ratio,
            help="svd: size of a difference's two factors over that of its matrix; ternary: share of entries that are "
            "not 0. [default: 0.25 for svd, 0.5 for ternary]",
        ),
    ] = None


def run(
    grouping: Grouping,
    delta: DeltaOptions,
    refitting: Refitting,
    planning: Planning,
    automatic: AutomaticProfile,
    source: Source,
    to: Destination,
    printing: Printing,
) -> None:
    """Merge the experts of each block into fewer, or store them as differences.

    Takes the routing profile of --profile, of the pipe, or beside the checkpoint; without one it is profiled first.
    """
    if planning.list_methods:
        return print_methods("merge", printing)
    planner = differencing_of(delta, grouping, refitting) or merging_of(grouping, refitting)
    return run_planner(planner, planning, automatic, source, to, printing)


def merging_of(grouping: Grouping, refitting: Refitting) -> Merging:
    """Return what to merge. Raises `UsageError` for unknown names and values out of range."""
    groups, method, router = grouping.groups, grouping.method, grouping.router
    if groups is None:
        raise UsageError("--groups is missing: give a ratio such as 0.5 or a count such as 4, or --delta in its place")
    keep = parse_keep(groups, "groups")
    return Merging(keep, method, "slice" if router == "slice" else "ghost", refitting.repair(router))


def differencing_of(options: DeltaOptions, grouping: Grouping, refitting: Refitting) -> Differencing | None:
    """Return how to store differences, None where that is not asked for. Raises `UsageError`."""
    if options.delta is None:
        if options.delta_ratio is not None:
            raise UsageError("--delta-ratio needs --delta svd or --delta ternary")
        return None
    if grouping.groups is not None:
        raise UsageError("--groups and --delta exclude each other: differences leave every expert in its place")
    refuse_idle(grouping, "with --delta, which merges no experts", "method", "router")
    refuse_idle(refitting, "with --delta, which refits no experts", "refit", "refit_tokens")
    kind, ratio = cast(DeltaFormat, options.delta), options.delta_ratio
    return Differencing(Differences(kind, DEFAULT_RATIOS[kind] if ratio is None else ratio))
