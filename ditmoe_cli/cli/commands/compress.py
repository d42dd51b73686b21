"""``ditmoe compress``: a checkpoint to a size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api import compressing_requests as asked
from ditmoe_cli.api.argument_checks import at_least, ending, one_of, refuse_idle
from ditmoe_cli.api.output_names import Size, parse_size
from ditmoe_cli.cli.calibration_options import AutomaticProfile
from ditmoe_cli.cli.curve_printing import CurveOutput, run_curve
from ditmoe_cli.cli.mixing_options import Mixing, parse_names
from ditmoe_cli.cli.options import ClockOpt, Destination, Measuring, Models, Source
from ditmoe_cli.cli.planning import run_planner
from ditmoe_cli.cli.terminal import Printing
from ditmoe_cli.compression.training.training_request import DEFAULT_MINUTES
from ditmoe_cli.exporting.targets import TARGETS

MACHINE = Models
EXAMPLES = (
    "ditmoe compress ckpt.pt --size 1.2GiB",
    "ditmoe compress ckpt.pt --ratio 0.25 | ditmoe fid",
    "ditmoe compress ckpt.pt --ratio 0.25 --heal --minutes 5",
    "ditmoe compress ckpt.pt --max-damage 0.02",
    "ditmoe compress ckpt.pt --ratio 0.25 --target sdnq | ditmoe export --to sdnq",
    "ditmoe compress ckpt.pt --curve --png curve.png",
    "ditmoe compress ckpt.pt --size 1.2GiB --plan-only > plan.json",
)


@dataclass(frozen=True)
class Goals(asked.Goals):
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


@dataclass(frozen=True)
class Tying(asked.Tying, Mixing):
    """Formats that a compression may choose from, and what it chooses alike."""

    tie: Annotated[
        tuple[str, ...],
        typer.Option(
            "--tie",
            metavar="stack|gate,up",
            parser=parse_names,
            help="What to choose alike: stack, one width and one format a matrix for all experts of a block, as fused "
            "kernels want it; or matrices of an expert that take one format. The result says what it costs.",
        ),
    ] = ()


@dataclass(frozen=True)
class Retrained(asked.Retrained):
    """Training of what was compressed."""

    panel: ClassVar[str] = "Training"

    heal: Annotated[
        bool,
        typer.Option(
            "--heal",
            help="Train the result to predict as the original does, as ditmoe heal.",
        ),
    ] = False
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            metavar="N",
            callback=at_least(1),
            help="Train the result to be sampled in N steps, with the guidance of the profile in its weights, as "
            "ditmoe distill.",
        ),
    ] = None
    minutes: Annotated[
        float, typer.Option("--minutes", metavar="M", help="Time for --heal or --steps, beside all else.")
    ] = DEFAULT_MINUTES
    clock: ClockOpt = None


@dataclass(frozen=True)
class Loading(asked.Loading):
    """What the result is to be loaded by."""

    panel: ClassVar[str] = "Result"

    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="NAME",
            callback=one_of(*TARGETS),
            help=f"Choose only what ditmoe export --to NAME can write: {', '.join(TARGETS)}. The result says what it "
            "costs.",
        ),
    ] = None


@dataclass(frozen=True)
class Foresight:
    """What is printed in place of writing a checkpoint."""

    panel: ClassVar[str] = "Instead of writing"

    curve: Annotated[
        bool,
        typer.Option(
            "--curve",
            help="Print sizes against errors, from the smallest possible file to the checkpoint's own, with a plan for "
            "each that ditmoe apply takes; a --size is marked.",
        ),
    ] = False
    png: Annotated[
        Path | None,
        typer.Option(
            "--png", metavar="FILE", callback=ending(".png"), help="Draw the --curve too; takes the report extra."
        ),
    ] = None
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Choose the plan as usual and print it, for ditmoe apply.")
    ] = False


def run(
    goals: Goals,
    foresight: Foresight,
    mixing: Tying,
    retrained: Retrained,
    loading: Loading,
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
    if foresight.curve:
        refuse_idle(foresight, "with --curve, which has many plans", "plan_only")
        refuse_idle(retrained, "with --curve", "heal", "steps", "minutes")
        curving = asked.curving_of(goals, mixing, loading)
        return run_curve(curving, measuring, automatic, source, CurveOutput(foresight.png, to, printing))
    refuse_idle(foresight, "without --curve", "png")
    planner = asked.compressing_of(goals, mixing, retrained, loading)
    return run_planner(planner, measuring, automatic, source, to, printing, plan_only=foresight.plan_only)
