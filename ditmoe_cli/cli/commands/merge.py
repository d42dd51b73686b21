"""``ditmoe merge``: several experts made into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api import merging_requests as asked
from ditmoe_cli.api.argument_checks import known, one_of
from ditmoe_cli.api.merging_requests import delta_ratio_in_range, differencing_of, merging_of
from ditmoe_cli.cli.calibration_options import AutomaticProfile
from ditmoe_cli.cli.options import Destination, Models, Planning, Refitting, Source
from ditmoe_cli.cli.planning import print_methods, run_planner
from ditmoe_cli.cli.terminal import Printing
from ditmoe_cli.compression.delta.delta_plan import DEFAULT_RATIOS
from ditmoe_cli.compression.methods import MERGES

MACHINE = Models
EXAMPLES = (
    "ditmoe merge ckpt.pt --groups 4",
    "ditmoe merge ckpt.pt --delta svd --delta-ratio 0.25",
)


@dataclass(frozen=True)
class Grouping(asked.Grouping):
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


@dataclass(frozen=True)
class DeltaOptions(asked.DeltaOptions):
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
            callback=delta_ratio_in_range,
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
