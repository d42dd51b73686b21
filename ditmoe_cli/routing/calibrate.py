"""Run a calibration and write its profile, or find the profile that is valid for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ditmoe_cli.errors import UsageError
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.progress import phase
from ditmoe_cli.routing.calibration_settings import Calibration, default_calibration, parse_calibration
from ditmoe_cli.routing.profile import RoutingProfile, read_profile, require_profile_of, write_profile

if TYPE_CHECKING:
    from ditmoe_cli.routing.calibration_data import CalibrationData


@dataclass(frozen=True)
class Run:
    """How a calibration runs: on which device, and with all blocks in memory or one at a time."""

    device: str
    offload: bool = False


def calibrate(
    checkpoint: Checkpoint,
    settings: Calibration,
    run: Run,
    path: Path,
    force: bool = False,
    data: CalibrationData | None = None,
) -> RoutingProfile | None:
    """Follow the model's own trajectories, or noise the images of `data`, and write a profile to `path`.

    Under torchrun the work is shared: rank 0 writes and returns the profile, the other ranks return None. Raises
    `OutputExistsError` for a path in the way, without `force`, and for that of an input, and `UsageError` for settings
    that cannot be followed and for an offloaded model under torchrun.
    """
    import torch

    from ditmoe_cli.files.staging import check_target
    from ditmoe_cli.model.loading import build_model
    from ditmoe_cli.model.offload import OffloadedDiTMoE
    from ditmoe_cli.processes import process_group
    from ditmoe_cli.routing.collect.collector import check_settings, collect

    inputs = (checkpoint.path, *([data.path] if data else []))
    check_target(path.absolute(), force, inputs)
    check_settings(settings)
    spec = settings.spec
    with process_group() as share:
        if run.offload and share.world > 1:
            raise UsageError("⟨offload⟩ reads the whole file at every step in one process; run it without torchrun")
        device = torch.device(run.device)
        model = (
            OffloadedDiTMoE(checkpoint, device, spec.images, settings.batch)
            if run.offload
            else build_model(checkpoint, device)
        )
        with phase(f"profiling {checkpoint.path.name}", spec.images * spec.steps // share.world, "steps") as progress:
            tensors = collect(model, settings, progress, clean=data.clean if data else None, share=share)
    if tensors is None:
        return None
    experts = tuple(len(block.expert_widths) for block in checkpoint.config.blocks)
    write_profile(path, tensors, checkpoint.fingerprint, settings.to_json(), experts, force, inputs)
    return read_profile(path)


def usable_profile(checkpoint: Checkpoint, given: Path | None) -> RoutingProfile | None:
    """Return the given profile if it is `checkpoint`'s own; None if there is none, or it is an ancestor's.

    Raises `BadInputError` for a profile of an unrelated checkpoint.
    """
    profile = read_profile(given) if given is not None else None
    if profile is None or profile.checkpoint in checkpoint.ancestors:
        return None
    return require_profile_of(profile, checkpoint.fingerprint, checkpoint.path)


def valid_profile(
    checkpoint: Checkpoint,
    given: Path | None,
    beside: Path,
    device: Callable[[], str],
    note: Callable[[str], None],
) -> RoutingProfile:
    """Return a profile that is valid for `checkpoint`, making one where there is none.

    A profile of the checkpoint itself is used. Given one of an ancestor, or none, the checkpoint is profiled with the
    ancestor's settings, or the default ones. The new profile stays in the folder `beside`, under a name that holds the
    fingerprint, and is used again there. `device()` names the device only where a calibration has to run; `note` takes
    a line on what happens. Raises `BadInputError` for a profile of an unrelated checkpoint.
    """
    own = usable_profile(checkpoint, given)
    if own is not None:
        return own
    ancestor = read_profile(given) if given is not None else None
    settings = parse_calibration(ancestor.calibration, checkpoint) if ancestor else default_calibration(checkpoint)
    cached = beside / f"{checkpoint.path.stem}.{checkpoint.fingerprint[:12]}.profile.safetensors"
    if cached.is_file():
        profile = read_profile(cached)
        if profile.checkpoint == checkpoint.fingerprint and dict(profile.calibration) == settings.to_json():
            note(f"using the profile kept in {cached}")
            return profile
    reason = "the profile is of an ancestor of it" if ancestor else "no profile was given"
    note(f"profiling {checkpoint.path.name} into {cached}: {reason}")
    new = calibrate(checkpoint, settings, Run(device()), cached, force=True)
    assert new is not None  # planners run in one process
    return new
