"""Run a calibration and write its profile, also the one that planning rests on."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ditmoe_cli.errors import BadInputError, OutputExistsError, UsageError
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dtypes import torch_dtype_of
from ditmoe_cli.processes import Share
from ditmoe_cli.progress import phase
from ditmoe_cli.routing.calibration_settings import Calibration, check_settings
from ditmoe_cli.routing.profile import RoutingProfile, read_profile, write_profile
from ditmoe_cli.routing.profile_search import Basis

if TYPE_CHECKING:
    from ditmoe_cli.routing.calibration_data import CalibrationData


@dataclass(frozen=True)
class Run:
    """How a calibration runs: on which device, with all blocks in memory or one at a time, and whom it tells."""

    device: str
    offload: bool = False
    note: Callable[[str], None] = lambda _: None


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
    that cannot be followed and for an offloaded model under torchrun. What an interrupted run has done is kept beside
    `path`, by each process its own, and gone on from.
    """
    import torch

    from ditmoe_cli.files.staging import check_target
    from ditmoe_cli.files.workfolder import open_work, work_key
    from ditmoe_cli.model.loading import build_model
    from ditmoe_cli.model.offload import OffloadedDiTMoE
    from ditmoe_cli.processes import process_group
    from ditmoe_cli.routing.collect.collector import collect
    from ditmoe_cli.routing.collect.footprint import check_footprint

    inputs = (checkpoint.path, *([data.path] if data else []))
    check_target(path.absolute(), force, inputs)
    check_settings(settings)
    check_footprint(checkpoint.config, settings, path.absolute())
    spec = settings.spec
    with process_group() as share:
        if run.offload and share.world > 1:
            raise UsageError("⟨offload⟩ reads the whole file at every step in one process; run it without torchrun")
        share.check_same("dtype", spec.dtype)
        device = torch.device(run.device)
        dtype = torch_dtype_of(spec.dtype)
        model = (
            OffloadedDiTMoE(checkpoint, device, spec.images, settings.batch, dtype, dtype)
            if run.offload
            else build_model(checkpoint, device, dtype).prepack()
        )
        key = work_key(
            {
                "checkpoint": checkpoint.fingerprint,
                "calibration": settings.to_json(),
                "run": [device.type, run.offload, share.rank, share.world],
            }
        )
        # all processes keep their work until the profile is written, whichever of them is stopped
        with open_work(_own_target(path, share), key, run.note) as work:
            clean = data.clean if data else None
            tensors = collect(model, settings, clean, share, work, f"profiling {checkpoint.name}")
            if tensors is not None:
                experts = tuple(len(block.expert_widths) for block in checkpoint.config.blocks)
                with phase(f"writing {path.name}"):
                    write_profile(path, tensors, checkpoint.fingerprint, settings.to_json(), experts, force, inputs)
            share.wait()
        if share.first:
            _discard_ranks(path)
    return read_profile(path) if share.first else None


def _discard_ranks(path: Path) -> None:
    """Delete what processes of earlier runs kept beside a profile that is whole; those at work delete their own."""
    from ditmoe_cli.files.workfolder import discard_work

    for left in sorted(path.absolute().parent.glob(f".{glob.escape(path.name)}.rank*.work")):
        discard_work(left.with_name(left.name.removeprefix(".").removesuffix(".work")))


def _own_target(path: Path, share: Share) -> Path:
    """Return the path beside which a process keeps its work: the profile's, or one named after it."""
    return path if share.first else path.with_name(f"{path.name}.rank{share.rank}")


def made_before(checkpoint: Checkpoint, settings: Calibration, path: Path) -> RoutingProfile | None:
    """Return the profile at `path` where it is of `checkpoint` and these settings, so that none has to be made.

    None where there is none, or where another kind of file or a link is in the way. Raises `OutputExistsError` for a
    profile of another checkpoint or of other settings.
    """
    if path.is_symlink() or not path.is_file():
        return None
    try:
        profile = read_profile(path)
    except BadInputError:
        return None
    old, new = dict(profile.calibration), settings.to_json()
    if profile.checkpoint == checkpoint.fingerprint and old == new:
        return profile
    changed = (name for name in sorted({*old, *new}) if old.get(name) != new.get(name))
    differs = next((f"made with {name} {old.get(name)}, not {new.get(name)}" for name in changed), "")
    if profile.checkpoint != checkpoint.fingerprint:
        differs = f"of another checkpoint ({profile.checkpoint[:12]})"
    raise OutputExistsError(
        f"{path}: exists already, a profile {differs}; give ⟨force⟩ to replace it, or ⟨output⟩ for another name"
    )


def made_profile(
    checkpoint: Checkpoint,
    basis: Basis,
    device: Callable[[], str],
    note: Callable[[str], None],
) -> RoutingProfile:
    """Return the profile that planning rests on, making it where there is none.

    `device()` names the device only where a calibration has to run; `note` takes a line on what happens. Under torchrun
    all processes make it together.
    """
    if basis.profile is not None:
        return basis.profile
    assert basis.calibration is not None
    note(f"profiling {checkpoint.name} into {basis.path}: {basis.reason}")
    new = calibrate(checkpoint, basis.calibration, Run(device(), note=note), basis.path, force=True, data=basis.data)
    return new or read_profile(basis.path)  # that the first process has written
