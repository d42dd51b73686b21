"""Options of guidance by a weaker model, and the guide that they ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api import guiding_requests as asked
from ditmoe_cli.api.argument_checks import one_of
from ditmoe_cli.api.guiding_requests import Guiding
from ditmoe_cli.cli.options import complete_checkpoint
from ditmoe_cli.cli.sampling_options import parse_interval
from ditmoe_cli.cli.stage import Stage, open_stage
from ditmoe_cli.diffusion.schedule import ALWAYS, Interval
from ditmoe_cli.diffusion.weak_guidance import RANKS


def beside(guiding: Guiding, stage: Stage) -> Guiding:
    """Return a guide with the weaker checkpoint that a pipe names, where none was given."""
    if guiding.weak is not None or stage.weak is None:
        return guiding
    return replace(guiding, weak=open_stage(stage, stage.weak))


def marked(guiding: Guiding, stage: Stage) -> Stage:
    """Return a stage that names the weaker checkpoint for the commands after this one."""
    return replace(stage, weak=str(guiding.weak.path.absolute())) if guiding.weak is not None else stage


@dataclass(frozen=True)
class StepGuiding(asked.StepGuiding):
    """Guidance by a weaker model, at every step."""

    panel: ClassVar[str] = "Guidance by a weaker model"

    guide_with: Annotated[
        str | None,
        typer.Option(
            "--guide-with",
            metavar="CHECKPOINT",
            autocompletion=complete_checkpoint,
            help="A weaker copy of the model, to guide away from: v + W (v_c - v_weak).",
        ),
    ] = None
    guide_by: Annotated[
        str | None,
        typer.Option(
            "--guide-by",
            metavar="top1|rank2",
            callback=one_of(*RANKS),
            help="Guide away from the model itself with one expert of each token alone, the first or the second by "
            "routing weight.",
        ),
    ] = None
    guide_scale: Annotated[
        float | None,
        typer.Option("--guide-scale", metavar="W", help="Scale of that guidance; 0 is none, 0.25 to 0.5 served best."),
    ] = None
    guide_interval: Interval = ALWAYS


@dataclass(frozen=True)
class WeakGuiding(StepGuiding):
    """Guidance by a weaker model, at noise levels of an interval."""

    guide_interval: Annotated[
        Interval,
        typer.Option(
            "--guide-interval",
            metavar="LOW,HIGH",
            parser=parse_interval,
            help="Noise levels, 0 to 1, between which the weaker model guides. [default: all]",
        ),
    ] = ALWAYS
