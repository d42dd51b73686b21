"""``ditmoe profile-experts``: how a checkpoint routes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from ditmoe_cli.api import calibration_requests as asked
from ditmoe_cli.api.calibration_requests import profiled, summary
from ditmoe_cli.cli.options import DeviceOpt, FileDestination, Models, Source
from ditmoe_cli.cli.sampling_options import SamplingOptions, complete_solver, parse_classes
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit
from ditmoe_cli.routing.calibration_settings import (
    STEPS,
    Calibration,
)
from ditmoe_cli.routing.profile import RoutingProfile

MACHINE = Models
EXAMPLES = (
    "ditmoe profile-experts ckpt.pt",
    "ditmoe profile-experts ckpt.pt --images 256 --cfg 1.5 -o ckpt.profile.safetensors",
    "torchrun --nproc-per-node 8 -m ditmoe_cli profile-experts ckpt.pt --device cuda",
)


@dataclass(frozen=True)
class Calibrating(asked.Calibrating, SamplingOptions):
    """How calibration images are sampled."""

    images: Annotated[
        int | None,
        typer.Option(
            "--images",
            metavar="N",
            help="Images to calibrate on. [default: 64, fewer of more than 64 tokens: 24 of 256, 16 of 512 and more]",
        ),
    ] = None  # type: ignore[assignment]
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", help=f"Sampling steps. [default: {STEPS}; a distilled checkpoint's own]"),
    ] = None
    solver: Annotated[
        str | None,
        typer.Option(
            "--solver",
            metavar="NAME",
            autocompletion=complete_solver,
            help="Solver: euler, ab2, ab4 or dpmpp-2m for rf; ddim, ddim-trailing, ddpm or "
            "dpmpp-2m for ddpm. [default: euler for rf, ddim for ddpm; a distilled checkpoint's own]",
        ),
    ] = None

    classes: Annotated[
        tuple[int, ...] | None,
        typer.Option(
            "--classes",
            metavar="LIST",
            parser=parse_classes,
            help="Labels to cycle through, as 0,3,7 or 0-3,7. [default: all, or as many as images, evenly spread]",
        ),
    ] = None


@dataclass(frozen=True)
class Profiling(asked.Profiling):
    """Counters, images and device of a calibration run."""

    panel: ClassVar[str] = "Profiling"

    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Images to add noise to instead of sampling: the first --images of a folder, an npz file, samples or "
            "latents. Images without labels get the null class.",
        ),
    ] = None
    bins: Annotated[
        int | None,
        typer.Option(
            "--bins", metavar="N", help="Bins of steps, from noise to image. [default: 10, or one for each step]"
        ),
    ] = None
    reservoir: Annotated[
        int, typer.Option("--reservoir", metavar="N", help="MoE inputs to keep of each block, in tokens.")
    ] = Calibration.reservoir
    fast: Annotated[bool, typer.Option("--fast", help="Keep counters only: no moments, no reservoir.")] = False
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            rich_help_panel="Machine",
            help="Keep one block in memory at a time; reads the file at every step.",
        ),
    ] = False
    batch: Annotated[
        int,
        typer.Option(
            "--batch", metavar="N", rich_help_panel="Machine", help="Images at a time; rounding may depend on it."
        ),
    ] = Calibration.batch
    device: DeviceOpt = "auto"


def run(sampling: Calibrating, profiling: Profiling, source: Source, to: FileDestination, printing: Printing) -> None:
    """Sample a model and count how it routes.

    Counts tokens by block, guidance branch, step bin, position and expert, and keeps routing weights, norms of the
    experts' outputs after γ, and a reservoir of MoE inputs: all that planners need.
    """
    stage = source.stage(shared=True)
    opened = open_stage(stage)
    target = to.at(opened.path, "profile").absolute()
    profile = profiled(opened, sampling, profiling, target, to.force)
    if profile is None:
        return  # another rank writes and prints
    result = summary(profile)
    data = {"path": str(profiling.data.absolute())} if profiling.data else {}
    options = {**profile.calibration, **data}
    done = stage.done("profile-experts", options, profile=target)
    emit(printing, done.to_json(result), rows(profile, result), str(target.absolute()))


def rows(profile: RoutingProfile, result: dict[str, Any]) -> list[Row]:
    """Return the load of each block as a table."""
    run = profile.calibration
    spec = f"{run['images']} images, {run['steps']} steps, cfg {run['cfg']}"
    loads = [(f"block {i} load", " ".join(f"{share:.3f}" for share in load)) for i, load in enumerate(result["load"])]
    dead = ", ".join(f"block {b} expert {e}" for b, e in result["never_routed"])
    return [("profile", profile.path.absolute()), ("calibration", spec), *loads, ("never routed", dead or "none")]
