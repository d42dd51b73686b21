"""Calibration runs: settings as data, running them, and finding a valid profile for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_cli.diffusion.sampling import SampleSpec, check_spec
from ditmoe_cli.diffusion.solvers import CALIBRATION_SOLVER, choose_solver
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.model.opened import Checkpoint
from ditmoe_cli.progress import ProgressBar
from ditmoe_cli.routing import calibration_defaults as defaults
from ditmoe_cli.routing.profile import RoutingProfile, read_profile, require_profile_of, write_profile

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """Settings of a calibration run: what is sampled, in how many step bins, and the tokens kept per block.

    `batch` belongs to them, since rounding may differ between batch sizes and tip a near-tie in top-k. `data` is
    the digest of the images that were noised, None where the model's own trajectories were followed. `fast` leaves out
    the moments and the reservoir.
    """

    spec: SampleSpec
    bins: int = defaults.BINS
    reservoir: int = defaults.RESERVOIR
    batch: int = defaults.BATCH
    data: str | None = None
    fast: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON, the sample spec's fields among them."""
        own = {"bins": self.bins, "reservoir": self.reservoir, "batch": self.batch, "fast": self.fast}
        return {**self.spec.conditions(), **own, "source": "data" if self.data else "trajectories", "data": self.data}


def parse_calibration(document: Mapping[str, Any], checkpoint: Checkpoint) -> Calibration:
    """Read settings from a profile's JSON, for use on `checkpoint`.

    Raises `BadInputError` where they are malformed, or ask for data that is not at hand.
    """
    if document.get("data") is not None:
        raise BadInputError(
            f"the profile of an ancestor of {checkpoint.path} was made from --data; profile {checkpoint.path} with the "
            "same data and give that as --profile"
        )
    spec = profiled_spec(document, checkpoint)
    try:
        bins, reservoir, batch = (int(document[name]) for name in ("bins", "reservoir", "batch"))
        if not 1 <= bins <= spec.steps or reservoir < 0 or batch < 1:
            raise ValueError(f"bins {bins}, reservoir {reservoir}, batch {batch}")
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise BadInputError(f"the profile's calibration settings are malformed ({error})") from None
    return Calibration(spec, bins, reservoir, batch, fast=document.get("fast") is True)


def profiled_spec(document: Mapping[str, Any], checkpoint: Checkpoint) -> SampleSpec:
    """Return what was sampled, or noised, for a profile of `checkpoint` with these settings.

    Raises `BadInputError` where they are malformed. Classes of --data are the label of the null class where there were
    none.
    """
    try:
        classes = document["classes"]
        spec = SampleSpec(
            images=int(document["images"]),
            steps=int(document["steps"]),
            cfg=float(document["cfg"]),
            seed=int(document["seed"]),
            solver=choose_solver(document["solver"], checkpoint.config.sampler),
            classes=tuple(range(int(classes[2:]) + 1)) if isinstance(classes, str) else tuple(map(int, classes)),
        )
        return check_spec(spec, checkpoint.config.num_classes + (document.get("data") is not None))
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise BadInputError(f"the profile's calibration settings are malformed ({error})") from None


def default_calibration(checkpoint: Checkpoint) -> Calibration:
    """Return the settings of a plain ``ditmoe profile-experts``."""
    solver = CALIBRATION_SOLVER[checkpoint.config.sampler]
    classes = tuple(range(checkpoint.config.num_classes))
    return Calibration(SampleSpec(defaults.IMAGES, defaults.STEPS, 1.0, 0, solver, classes))


def calibrate(
    checkpoint: Checkpoint,
    settings: Calibration,
    device: str,
    path: Path,
    force: bool,
    bar: ProgressBar,
    clean: Tensor | None = None,
    inputs: tuple[Path, ...] = (),
    offload: bool = False,
) -> RoutingProfile | None:
    """Run a calibration, on its own trajectories or on `clean` images, and write its profile to `path`.

    Under torchrun the work is shared; rank 0 writes, and the other ranks return None.

    `inputs` are files that must not be written over, beside the checkpoint itself. `offload` keeps one block's weights
    in memory at a time.
    """
    import torch

    from ditmoe_cli.files.staging import check_target
    from ditmoe_cli.model.loading import build_model
    from ditmoe_cli.model.offload import OffloadedDiTMoE
    from ditmoe_cli.processes import process_group
    from ditmoe_cli.routing.collect.collector import check_settings, collect

    inputs = (checkpoint.path, *inputs)
    check_target(path.absolute(), force, inputs)
    check_settings(settings.spec, settings.bins, settings.reservoir)
    spec = settings.spec
    with process_group() as share:
        if offload and share.world > 1:
            raise UsageError("--offload reads the whole file at every step in one process; run it without torchrun")
        place = torch.device(device)
        model = (
            OffloadedDiTMoE(checkpoint, place, spec.images, settings.batch)
            if offload
            else build_model(checkpoint, place)
        )
        with bar(f"profiling {checkpoint.path.name}", spec.images * spec.steps // share.world) as progress:
            tensors = collect(
                *(model, spec, settings.bins, settings.reservoir, settings.batch, progress, clean, settings.fast, share)
            )
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
    bar: ProgressBar,
    say: Callable[[str], None],
) -> RoutingProfile:
    """Return a profile that is valid for `checkpoint`, making one where there is none.

    A profile of the checkpoint itself is used. With one of an ancestor, or with none, the checkpoint is profiled
    with the ancestor's settings (or the default ones) and the profile is kept in the folder `beside`, under a
    name that holds the fingerprint, where it is found again. `device()` names where to run, if it must. Raises
    `BadInputError` for a profile of an unrelated checkpoint.
    """
    own = usable_profile(checkpoint, given)
    if own is not None:
        return own
    ancestor = read_profile(given) if given is not None else None
    settings = parse_calibration(ancestor.calibration, checkpoint) if ancestor else default_calibration(checkpoint)
    cached = beside / f"{checkpoint.path.stem}.{checkpoint.fingerprint[:12]}.profile.safetensors"
    if cached.is_file():
        found = read_profile(cached)
        if found.checkpoint == checkpoint.fingerprint and dict(found.calibration) == settings.to_json():
            say(f"using the profile kept in {cached}")
            return found
    reason = "the profile is of an ancestor of it" if ancestor else "no profile was given"
    say(f"profiling {checkpoint.path.name} into {cached}: {reason}")
    made = calibrate(checkpoint, settings, device(), cached, force=True, bar=bar)
    assert made is not None  # planners run in one process
    return made
