"""``ditmoe compress``: a checkpoint to a size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.cli.calibration_options import AutomaticProfile
from ditmoe_cli.cli.mixing_options import Mixing
from ditmoe_cli.cli.options import Destination, Measuring, Models, Size, Source, parse_size
from ditmoe_cli.cli.planning import run_planner
from ditmoe_cli.cli.terminal import Printing
from ditmoe_cli.compression.joint.compressing import Compressing, Goal
from ditmoe_cli.compression.precision.candidates import DEFAULT_GROUP_SIZE

MACHINE = Models
EXAMPLES = (
    "ditmoe compress ckpt.pt --size 1.2GiB",
    "ditmoe compress ckpt.pt --ratio 0.25 | ditmoe fid",
    "ditmoe compress ckpt.pt --max-damage 0.02",
)
STACK = "stack"


@dataclass(frozen=True)
class Goals:
    """The size or the damage to reach."""

    panel: ClassVar[str] = "Goal"

    size: Annotated[
        Size | None,
        typer.Option("--size", metavar="SIZE", parser=parse_size, help="Size of the whole file, as 1.2GiB or 900MB."),
    ] = None
    ratio: Annotated[
        float | None, typer.Option("--ratio", metavar="R", help="Size as a share of the checkpoint's file, as 0.25.")
    ] = None
    max_damage: Annotated[
        float | None,
        typer.Option(
            "--max-damage",
            metavar="X",
            help="The smallest file whose relative squared error of the guided prediction is at most X, by its upper "
            "95 % bound over held-out calibration images, as 0.02.",
        ),
    ] = None


def run(
    goals: Goals,
    mixing: Mixing,
    measuring: Measuring,
    automatic: AutomaticProfile,
    source: Source,
    to: Destination,
    printing: Printing,
) -> None:
    """Compress to a size: fewer neurons and fewer bits, planned together so that the prediction changes least.

    How many neurons each expert keeps, none at all included, and the format of each matrix come from one budget of
    bytes. Plans are carried out and tried on held-out calibration images, and the best one is written: narrowed,
    rounded and refitted block after block.
    """
    goal = Goal(goals.size.bytes if goals.size is not None else None, goals.ratio, goals.max_damage)
    stacked = STACK in mixing.tie
    tied = replace(mixing, tie=tuple(name for name in mixing.tie if name != STACK))
    candidates = tied.candidates(DEFAULT_GROUP_SIZE, symmetric=False)
    return run_planner(Compressing(goal, candidates, stacked), measuring, automatic, source, to, printing)
