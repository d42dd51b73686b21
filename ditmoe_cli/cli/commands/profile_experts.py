"""``ditmoe profile-experts``: how a checkpoint routes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ditmoe_cli.cli.options import (
    Batch,
    CalibrationSolver,
    Cfg,
    CheckpointArg,
    Classes,
    Device,
    FileOutputOpt,
    Force,
    Heads,
    Json,
    Quiet,
    SamplerOpt,
    Seed,
    Steps,
    TopK,
    checked_device,
    given,
    require_safetensors,
)
from ditmoe_cli.cli.sampling import SamplingOptions, sample_spec
from ditmoe_cli.cli.stage import default_output, incoming, open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit, note, progress
from ditmoe_cli.errors import UsageError
from ditmoe_cli.routing.calibration_settings import IMAGES, STEPS, Calibration

if TYPE_CHECKING:
    from ditmoe_cli.routing.profile import RoutingProfile

Images = Annotated[int, typer.Option("--images", metavar="N", help="Images to calibrate on.")]
Bins = Annotated[int, typer.Option("--bins", metavar="N", help="Step bins, from noise to image.")]
Reservoir = Annotated[int, typer.Option("--reservoir", metavar="N", help="MoE inputs kept per block, in tokens.")]

DataOpt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--data",
        metavar="PATH",
        help="Noise the first --images of these images (folder, npz, samples; latents) instead of sampling; "
        "those without labels get the null class.",
    ),
]
OffloadOpt = Annotated[
    bool, typer.Option("--offload", help="Keep one block's weights in memory at a time; reads the file every step.")
]
FastOpt = Annotated[bool, typer.Option("--fast", help="Counters only: no moments, no reservoir.")]


def run(
    checkpoint: CheckpointArg = None,
    images: Images = IMAGES,
    data: DataOpt = None,
    bins: Bins = Calibration.bins,
    reservoir: Reservoir = Calibration.reservoir,
    fast: FastOpt = False,
    offload: OffloadOpt = False,
    steps: Steps = STEPS,
    cfg: Cfg = 1.0,
    solver: CalibrationSolver = None,
    classes: Classes = None,
    seed: Seed = 0,
    batch: Batch = Calibration.batch,
    device: Device = "cpu",
    heads: Heads = None,
    top_k: TopK = None,
    sampler: SamplerOpt = None,
    output: FileOutputOpt = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Sample the model and count its routing.

    Counts by block, branch, step bin, position and expert; keeps gate mass, output norms after γ, and a reservoir
    of MoE inputs: all that planners need.
    """
    stage = incoming(checkpoint, given(heads, top_k, sampler), shared=True)
    opened = open_stage(stage)
    from ditmoe_cli.routing.calibrate import Run, calibrate
    from ditmoe_cli.routing.calibration_data import read_data

    if data and classes:
        raise UsageError("--classes has no effect on --data, whose images have labels of their own")
    given_data = read_data(data, opened.config, images) if data else None
    if given_data and all(label == opened.config.num_classes for label in given_data.labels):
        note(f"{data} has no labels: all images are profiled under the null class")
    spec = sample_spec(opened, SamplingOptions(images, steps, cfg, seed, solver, classes), calibration=True)
    spec = replace(spec, images=len(given_data.labels), classes=given_data.labels) if given_data else spec
    settings = Calibration(spec, bins, reservoir, batch, given_data.digest if given_data else None, fast)
    target = require_safetensors(output or default_output(opened.path, "profile"))
    profile = calibrate(opened, settings, Run(checked_device(device), progress, offload), target, force, given_data)
    if profile is None:
        return  # another rank writes and prints
    result = summary(profile)
    done = stage.done("profile-experts", settings.to_json(), profile=target)
    emit(Printing(json, quiet), done.to_json(result), rows(profile, result), str(target.absolute()))


def summary(profile: RoutingProfile) -> dict[str, Any]:
    """Return what a program wants to know at once: tokens seen, and each block's load and saliency."""
    from ditmoe_cli.routing.saliency import frequency, reap

    return {
        "calibration": dict(profile.calibration),
        "fingerprint": profile.checkpoint,
        "load": frequency(profile.tables),
        "reap": reap(profile.tables),
        "never_routed": [list(pair) for pair in profile.never_routed()],
        "flip_rate": float(profile.tensor("flip_rate")) if "flip_rate" in profile.header.tensors else None,
        "bytes": profile.path.stat().st_size,
    }


def rows(profile: RoutingProfile, result: dict[str, Any]) -> list[Row]:
    """Return the load of each block as a table."""
    run = profile.calibration
    spec = f"{run['images']} images, {run['steps']} steps, cfg {run['cfg']}"
    loads = [(f"block {i} load", " ".join(f"{share:.3f}" for share in load)) for i, load in enumerate(result["load"])]
    dead = ", ".join(f"block {b} expert {e}" for b, e in result["never_routed"])
    return [("profile", profile.path.absolute()), ("calibration", spec), *loads, ("never routed", dead or "none")]
