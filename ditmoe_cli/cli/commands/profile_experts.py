"""``ditmoe profile-experts``: how a checkpoint routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from ditmoe_cli.api.argument_checks import refuse_idle
from ditmoe_cli.api.devices import checked_device
from ditmoe_cli.api.foretelling import foretell
from ditmoe_cli.cli.options import DeviceOpt, FileDestination, Models, Source
from ditmoe_cli.cli.sampling_options import SamplingOptions, complete_solver, parse_classes
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit, note
from ditmoe_cli.compression.estimates import profiling_estimate
from ditmoe_cli.diffusion.sampling import SampleSpec, choose_bins
from ditmoe_cli.diffusion.schedule import CALIBRATION_SOLVER, Solver
from ditmoe_cli.errors import UsageError
from ditmoe_cli.files.staging import check_target, clean_leftovers
from ditmoe_cli.files.workfolder import discard_work
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dtypes import Dtype
from ditmoe_cli.processes import first_process
from ditmoe_cli.routing.calibrate import Run, calibrate, made_before
from ditmoe_cli.routing.calibration_data import CalibrationData, read_data
from ditmoe_cli.routing.calibration_settings import (
    STEPS,
    Calibration,
    check_settings,
    default_calibration,
    usual_classes,
)
from ditmoe_cli.routing.profile import RoutingProfile
from ditmoe_cli.routing.saliency import frequency, reap

MACHINE = Models
EXAMPLES = (
    "ditmoe profile-experts ckpt.pt",
    "ditmoe profile-experts ckpt.pt --images 256 --cfg 1.5 -o ckpt.profile.safetensors",
    "torchrun --nproc-per-node 8 -m ditmoe_cli profile-experts ckpt.pt --device cuda",
)


@dataclass(frozen=True)
class Calibrating(SamplingOptions):
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

    def images_of(self, checkpoint: Checkpoint) -> int:
        """Return the number of images: as many as `usual_images` where none is given."""
        return self.images if self.images is not None else default_calibration(checkpoint).spec.images

    def spec(
        self, checkpoint: Checkpoint, solvers: Mapping[Sampler, Solver] = CALIBRATION_SOLVER, dtype: Dtype = "fp32"
    ) -> SampleSpec:
        """Return the spec that the options ask for, labels by `usual_classes` where none are given.

        Raises `UsageError` for values out of range.
        """
        images = self.images_of(checkpoint)
        classes = usual_classes(images, checkpoint.config.num_classes) if self.classes is None else self.classes
        steps = default_calibration(checkpoint).spec.steps if self.steps is None else self.steps
        counted = replace(self, images=images, classes=classes, steps=steps)
        return super(Calibrating, counted).spec(checkpoint, solvers, dtype)


@dataclass(frozen=True)
class Profiling:
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

    def settings(self, spec: SampleSpec, digest: str | None) -> Calibration:
        """Return the settings of the calibration; `digest` is that of the images to add noise to."""
        if self.fast:
            refuse_idle(self, "with --fast, which keeps none", "reservoir")
        return Calibration(spec, choose_bins(self.bins, spec.steps), self.reservoir, self.batch, digest, self.fast)

    def images(self, checkpoint: Checkpoint, sampling: Calibrating) -> CalibrationData | None:
        """Return the images to add noise to, None where images are sampled. Raises `UsageError` for --classes."""
        if self.data is None:
            return None
        if sampling.classes:
            raise UsageError("--classes has no effect on --data, whose images have labels of their own")
        data = read_data(self.data, checkpoint.config, sampling.images_of(checkpoint))
        if all(label == checkpoint.config.num_classes for label in data.labels):
            note(f"{self.data} has no labels: all images are profiled under the null class")
        return data


def run(sampling: Calibrating, profiling: Profiling, source: Source, to: FileDestination, printing: Printing) -> None:
    """Sample a model and count how it routes.

    Counts tokens by block, guidance branch, step bin, position and expert, and keeps routing weights, norms of the
    experts' outputs after γ, and a reservoir of MoE inputs: all that planners need.
    """
    stage = source.stage(shared=True)
    opened = open_stage(stage)
    data = profiling.images(opened, sampling)
    spec = sampling.on(profiling.device, CALIBRATION_SOLVER)(opened)
    if data is not None:
        spec = replace(spec, images=len(data.labels), classes=data.labels)
    settings = profiling.settings(spec, data.digest if data else None)
    check_settings(settings)
    target = to.at(opened.path, "profile").absolute()
    profile = None if to.force else made_before(opened, settings, target)
    if profile is not None:
        clean_leftovers(target)
        discard_work(target)
        note(f"{target} is up to date")
    else:
        check_target(target, to.force, (opened.path, *([data.path] if data else [])))
        run = Run(checked_device(profiling.device), profiling.offload, note)
        if not profiling.offload:
            foretell([profiling_estimate(opened.config, settings)], lambda: run.device)
        profile = calibrate(opened, settings, run, target, to.force, data)
    if profile is None or not first_process():
        return  # another rank writes and prints
    result = summary(profile)
    options = {**settings.to_json(), **({"path": str(data.path.absolute())} if data else {})}
    done = stage.done("profile-experts", options, profile=target)
    emit(printing, done.to_json(result), rows(profile, result), str(target.absolute()))


def summary(profile: RoutingProfile) -> dict[str, Any]:
    """Return calibration, load and saliency of each block, and experts without tokens as JSON."""
    return {
        "calibration": dict(profile.calibration),
        "fingerprint": profile.checkpoint,
        "load": frequency(profile.tables),
        "reap": reap(profile.tables),
        "never_routed": [list(pair) for pair in profile.never_routed()],
        "flip_rate": profile.flip_rate,
        "bytes": profile.path.stat().st_size,
    }


def rows(profile: RoutingProfile, result: dict[str, Any]) -> list[Row]:
    """Return the load of each block as a table."""
    run = profile.calibration
    spec = f"{run['images']} images, {run['steps']} steps, cfg {run['cfg']}"
    loads = [(f"block {i} load", " ".join(f"{share:.3f}" for share in load)) for i, load in enumerate(result["load"])]
    dead = ", ".join(f"block {b} expert {e}" for b, e in result["never_routed"])
    return [("profile", profile.path.absolute()), ("calibration", spec), *loads, ("never routed", dead or "none")]
