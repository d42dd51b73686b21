"""Options of the profile that planners make where none is at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api import planning_requests
from ditmoe_cli.api.argument_checks import seed_of_64_bits
from ditmoe_cli.cli.options import Measuring
from ditmoe_cli.cli.sampling_options import parse_classes
from ditmoe_cli.cli.stage import Stage
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.profile_search import ProfileRequest


@dataclass(frozen=True)
class AutomaticProfile(planning_requests.AutomaticProfile):
    """How the checkpoint is profiled where no profile of it is at hand."""

    panel: ClassVar[str] = "Profile, where one has to be made"

    calibration_cfg: Annotated[
        float | None,
        typer.Option(
            "--calibration-cfg",
            metavar="S",
            help="Guidance scale to profile with. [default: that of the ancestor's profile, else 1]",
        ),
    ] = None
    calibration_steps: Annotated[
        int | None,
        typer.Option(
            "--calibration-steps",
            metavar="N",
            help="Sampling steps. [default: those of the ancestor's, else 20; a distilled checkpoint's own]",
        ),
    ] = None
    calibration_images: Annotated[
        int | None,
        typer.Option(
            "--calibration-images",
            metavar="N",
            help="Images. [default: as many as the ancestor's, else as profile-experts]",
        ),
    ] = None
    calibration_data: Annotated[
        Path | None,
        typer.Option("--calibration-data", metavar="PATH", help="Images to add noise to instead of sampling."),
    ] = None
    calibration_classes: Annotated[
        tuple[int, ...] | None,
        typer.Option(
            "--calibration-classes",
            metavar="LIST",
            parser=parse_classes,
            help="Labels to cycle through. [default: those of the ancestor's, else as profile-experts]",
        ),
    ] = None
    calibration_seed: Annotated[
        int | None,
        typer.Option(
            "--calibration-seed",
            metavar="N",
            callback=seed_of_64_bits,
            help="Seed of the noise. [default: that of the ancestor's, else 0]",
        ),
    ] = None

    def request(
        self, stage: Stage, checkpoint: Checkpoint, planning: Measuring, beside: Path, *, measures: bool = True
    ) -> ProfileRequest:
        """Return what is asked of the profile, which the pipe may name; see `wanted`."""
        lay = next((s["options"]["path"] for s in reversed(stage.history) if _names_data(s)), None)
        return replace(
            self.wanted(checkpoint, planning, beside, measures=measures),
            given=planning.profile_for(stage),
            is_piped=planning.profile is None,
            piped_data=Path(lay) if lay else None,
        )


def _names_data(step: object) -> bool:
    """Return whether a step of a pipe's history names the images that it noised."""
    options = step.get("options") if isinstance(step, dict) else None
    return isinstance(options, dict) and isinstance(options.get("path"), str) and bool(options.get("data"))
