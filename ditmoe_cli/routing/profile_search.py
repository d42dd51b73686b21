"""The search for a profile that is valid for a checkpoint, and for the settings to make one with. Torch-free.

A profile that is given or piped comes first, then one with the default name; else the checkpoint is profiled with the
settings of its ancestor, as far as no others are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_cli.diffusion.few_steps import other_steps, told_steps
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dtypes import Dtype
from ditmoe_cli.routing.calibration_settings import (
    Calibration,
    WantedCalibration,
    default_calibration,
    parse_calibration,
    setting,
    told,
)
from ditmoe_cli.routing.profile import RoutingProfile, read_profile, require_profile_of

if TYPE_CHECKING:
    from ditmoe_cli.routing.calibration_data import CalibrationData

ANYTHING = WantedCalibration()
Note = Callable[[str], None]


@dataclass(frozen=True)
class ProfileRequest:
    """What is known about the profile that planning takes.

    Attributes:
        given: the profile that was given or piped.
        wanted: calibration settings that were asked for.
        data: images to noise that were asked for.
        piped_data: where the images of the pipe's profile lay.
        usual: files that ``ditmoe profile-experts`` writes without a name for its output.
        beside: folder that a profile is kept in where planning makes it.
        dtype: returns the dtype of a new calibration where neither it nor an ancestor's profile names one.
        is_piped: whether `given` came through a pipe.
    """

    given: Path | None = None
    wanted: WantedCalibration = ANYTHING
    data: Path | None = None
    piped_data: Path | None = None
    usual: tuple[Path, ...] = ()
    beside: Path = Path()
    dtype: Callable[[Checkpoint], Dtype] = lambda _: "fp32"
    is_piped: bool = False

    def refuse_settings(self, who: str) -> None:
        """Raise `UsageError` where settings were asked for and nobody, named by `who`, would profile with them."""
        asked = [*self.wanted.given(), *(["data"] if self.data is not None else [])]
        if asked:
            raise UsageError(f"{setting(asked[0])} has no effect: {who} takes no profile; leave it out")


@dataclass(frozen=True)
class Basis:
    """The profile to plan with, or the calibration that has to make it.

    Attributes:
        profile: the profile, None where it has to be made.
        settings: settings of the calibration.
        path: where the profile is, or is to be.
        data: images to noise, None where images are sampled.
        reason: why it has to be made, and with which settings.
    """

    profile: RoutingProfile | None
    settings: Mapping[str, Any]
    path: Path
    calibration: Calibration | None = None
    data: CalibrationData | None = None
    reason: str = ""


def search(checkpoint: Checkpoint, request: ProfileRequest, note: Note) -> Basis:
    """Return the profile that is valid for `checkpoint`, or how to make one.

    `note` takes a line on a profile that is found or passed over. Raises `BadInputError` for a given profile of an
    unrelated checkpoint and for images that are not at hand, `UsageError` for settings that the given profile was not
    made with, or that are out of range.
    """
    given = _of_these_states(checkpoint, request, note)
    if given is not None and given.checkpoint not in checkpoint.ancestors:
        return _own(require_profile_of(given, checkpoint.fingerprint, checkpoint.path), request)
    found = _with_usual_name(checkpoint, request, note) if given is None else None
    if found is not None:
        return Basis(found, found.calibration, found.path)
    inherited = given.calibration if given is not None else checkpoint.calibration
    basis = _to_make(checkpoint, request, inherited, note)
    kept = own_profile(checkpoint, basis.path, lambda _: None)
    if kept is not None and dict(kept.calibration) == dict(basis.settings):
        note(f"using the profile kept in {kept.path} ({told(kept.calibration)})")
        return Basis(kept, kept.calibration, kept.path)
    return basis


def _of_these_states(checkpoint: Checkpoint, request: ProfileRequest, note: Note) -> RoutingProfile | None:
    """Return the given profile; None without any, and for a piped one from before the checkpoint was distilled.

    Raises `BadInputError` for one that was given otherwise: its states are not those of the distilled checkpoint.
    """
    profile = read_profile(request.given) if request.given is not None else None
    if profile is None or checkpoint.distilled is None or profile.checkpoint not in checkpoint.teachers:
        return profile
    steps = told_steps(checkpoint.distilled)
    if request.is_piped:
        note(
            f"{profile.path}: from before {checkpoint.name} was distilled to {steps}; its states are others, and it is "
            "not used"
        )
        return None
    raise BadInputError(
        f"{profile.path}: is of a checkpoint from before {checkpoint.name} was distilled to {steps}, whose states are "
        "others; leave it out, or profile the distilled checkpoint"
    )


def _own(profile: RoutingProfile, request: ProfileRequest) -> Basis:
    """Return the given profile. Raises `UsageError` where settings were asked for that it was not made with."""
    unlike = _unlike(profile, request)
    if unlike is not None:
        raise UsageError(f"{unlike} ({profile.path}); leave one of both out")
    return Basis(profile, profile.calibration, profile.path)


def _unlike(profile: RoutingProfile, request: ProfileRequest) -> str | None:
    """Return how a profile differs from the settings that were asked for; None where it does not."""
    from ditmoe_cli.evaluation.images import images_digest

    if request.data is not None and profile.calibration.get("data") != _digest(request.data, images_digest):
        made = "other images" if profile.calibration.get("data") else "images that it sampled"
        return f"⟨calibration_data⟩ {request.data}: the profile was made with {made}"
    return request.wanted.unlike(profile.calibration)


def _digest(path: Path, digest: Callable[[Path], str]) -> str:
    """Return a file's digest. Raises `BadInputError` where there is none."""
    if not path.exists():
        raise BadInputError(f"{path}: no such file")
    return digest(path)


def kept_name(checkpoint: Checkpoint, fingerprint: str) -> str:
    """Return the name of the profile that a planner makes of a checkpoint of that fingerprint."""
    return f"{Path(checkpoint.name).stem}.{fingerprint[:12]}.profile.safetensors"


def _with_usual_name(checkpoint: Checkpoint, request: ProfileRequest, note: Note) -> RoutingProfile | None:
    """Return the first profile under a usual name that is the checkpoint's own and as asked for."""
    for path in request.usual:
        profile = own_profile(checkpoint, path, note)
        if profile is None:
            continue
        unlike = _unlike(profile, request)
        if unlike is None:
            note(f"using the profile {path} ({told(profile.calibration)})")
            return profile
        note(f"passing over {path}: {unlike}")
    return None


def own_profile(checkpoint: Checkpoint, path: Path, note: Note) -> RoutingProfile | None:
    """Return the profile at `path` where it is the checkpoint's own; None where there is none, or another's."""
    if not path.is_file():
        return None
    try:
        profile = read_profile(path)
    except BadInputError as error:
        note(f"passing over {path}: {error}")
        return None
    if profile.checkpoint != checkpoint.fingerprint:
        note(f"passing over {path}: it is the profile of another checkpoint ({profile.checkpoint[:12]})")
        return None
    return profile


def _to_make(checkpoint: Checkpoint, request: ProfileRequest, inherited: Mapping[str, Any] | None, note: Note) -> Basis:
    """Return the calibration that has to make the profile."""
    usual = default_calibration(checkpoint, "fp32" if inherited is not None else request.dtype(checkpoint))
    settings = usual if inherited is None else parse_calibration(inherited, checkpoint)
    # planners may need what a fast profile lacks, and would notice only after it was made
    settings = replace(settings, fast=False, reservoir=settings.reservoir or usual.reservoir)
    whose = "no profile was given" if inherited is None else "as the profile of its ancestor"
    if inherited is None and checkpoint.distilled is not None:
        whose = f"distilled to {told_steps(checkpoint.distilled)}"
    if request.wanted.given() or request.data is not None:
        whose += " but for what was asked for" if inherited is not None else ""
    settings, data = _with_data(checkpoint, request, settings)
    warning = other_steps(checkpoint, settings.spec.solver, settings.spec.steps)
    if warning is not None:
        note(warning)
    document = settings.to_json()
    path = request.beside / kept_name(checkpoint, checkpoint.fingerprint)
    return Basis(None, document, path, settings, data, f"{whose}: {told(document)}")


def _with_data(
    checkpoint: Checkpoint, request: ProfileRequest, settings: Calibration
) -> tuple[Calibration, CalibrationData | None]:
    """Return the settings with what was asked for, and the images to noise.

    Raises `BadInputError` where an ancestor was profiled on images that are not at hand, `UsageError` for classes of
    images that have labels of their own.
    """
    from ditmoe_cli.evaluation.images import images_digest
    from ditmoe_cli.routing.calibration_data import read_data

    wanted = settings.data
    path = request.data
    if path is None and wanted is not None:
        lay = request.piped_data
        if lay is None or not lay.exists() or images_digest(lay) != wanted:
            raise BadInputError(
                f"an ancestor of {checkpoint.path} was profiled on images that were given (SHA-256 {wanted[:12]}); "
                "give them as ⟨calibration_data⟩"
            )
        path = lay
    if path is None:
        return request.wanted.over(settings, checkpoint), None
    if request.wanted.classes is not None:
        raise UsageError("⟨calibration_classes⟩ has no effect on ⟨calibration_data⟩, whose images have labels")
    images = request.wanted.images or settings.spec.images
    data = read_data(path, checkpoint.config, images)
    over = replace(request.wanted, images=None)
    spec = replace(settings.spec, images=len(data.labels), classes=data.labels)
    return over.over(replace(settings, spec=spec, data=data.digest), checkpoint), data
