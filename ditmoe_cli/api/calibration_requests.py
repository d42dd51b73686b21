"""What is asked of a profile, and what it shows in brief."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ditmoe_cli.api.argument_checks import refuse_idle
from ditmoe_cli.api.devices import checked_device
from ditmoe_cli.api.foretelling import foretell
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.sampling_requests import SamplingOptions
from ditmoe_cli.compression.estimates import profiling_estimate
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.diffusion.schedule import CALIBRATION_SOLVER, Solver
from ditmoe_cli.diffusion.step_bins import choose_bins
from ditmoe_cli.errors import UsageError
from ditmoe_cli.files.staging import check_target, clean_leftovers
from ditmoe_cli.files.workfolder import discard_work
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dtypes import Dtype
from ditmoe_cli.processes import first_process
from ditmoe_cli.routing.calibrate import Run, calibrate, made_before
from ditmoe_cli.routing.calibration_data import CalibrationData, read_data
from ditmoe_cli.routing.calibration_settings import Calibration, check_settings, default_calibration, usual_classes
from ditmoe_cli.routing.profile import RoutingProfile
from ditmoe_cli.routing.saliency import frequency, reap


@dataclass(frozen=True)
class Calibrating(SamplingOptions):
    """How calibration images are sampled."""

    images: int | None = None  # type: ignore[assignment]

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

    data: Path | None = None
    bins: int | None = None
    reservoir: int = Calibration.reservoir
    fast: bool = False
    offload: bool = False
    batch: int = Calibration.batch
    device: str = "auto"

    def settings(self, spec: SampleSpec, digest: str | None) -> Calibration:
        """Return the settings of the calibration; `digest` is that of the images to add noise to."""
        if self.fast:
            refuse_idle(self, "with ⟨fast⟩, which keeps none", "reservoir")
        return Calibration(spec, choose_bins(self.bins, spec.steps), self.reservoir, self.batch, digest, self.fast)

    def images(self, checkpoint: Checkpoint, sampling: Calibrating) -> CalibrationData | None:
        """Return the images to add noise to, None where images are sampled. Raises `UsageError` for their classes."""
        if self.data is None:
            return None
        if sampling.classes:
            raise UsageError("⟨classes⟩ has no effect on ⟨data⟩, whose images have labels of their own")
        data = read_data(self.data, checkpoint.config, sampling.images_of(checkpoint))
        if all(label == checkpoint.config.num_classes for label in data.labels):
            note(f"{self.data} has no labels: all images are profiled under the null class")
        return data


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


def profiled(
    checkpoint: Checkpoint, sampling: Calibrating, profiling: Profiling, target: Path, force: bool
) -> RoutingProfile | None:
    """Profile a checkpoint into `target`, unless that was done before. None in all processes but the first."""
    data = profiling.images(checkpoint, sampling)
    spec = sampling.on(profiling.device, CALIBRATION_SOLVER)(checkpoint)
    if data is not None:
        spec = replace(spec, images=len(data.labels), classes=data.labels)
    settings = profiling.settings(spec, data.digest if data else None)
    check_settings(settings)
    profile = None if force else made_before(checkpoint, settings, target)
    if profile is not None:
        clean_leftovers(target)
        discard_work(target)
        note(f"{target} is up to date")
    else:
        check_target(target, force, (checkpoint.path, *([data.path] if data else [])))
        run = Run(checked_device(profiling.device), profiling.offload, note)
        if not profiling.offload:
            foretell([profiling_estimate(checkpoint.config, settings)], lambda: run.device)
        profile = calibrate(checkpoint, settings, run, target, force, data)
    return profile if first_process() else None
