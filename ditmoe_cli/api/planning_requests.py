"""What planners have in common: the profile that they take or make, and the refit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ditmoe_cli.api.argument_checks import refuse_idle, tuple_of
from ditmoe_cli.api.devices import dtype_on
from ditmoe_cli.api.output_names import usual_profiles
from ditmoe_cli.compression.plan import MOST_TOKENS, Repair
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dtypes import AUTO, parse_dtype
from ditmoe_cli.routing.calibration_settings import WantedCalibration
from ditmoe_cli.routing.profile import RoutingProfile
from ditmoe_cli.routing.profile_search import ProfileRequest


@dataclass(frozen=True)
class Measuring:
    """Profile, device and dtype that a plan is made with."""

    profile: Path | None = None
    device: str = "auto"
    dtype: str = AUTO


def fitted_tokens(tokens: int) -> int:
    """Return a number of calibration tokens to fit on, 0 for the default. Raises `ValueError` out of range."""
    if not 0 <= tokens <= MOST_TOKENS:
        raise ValueError(f"give at most {MOST_TOKENS}, since all are in memory at once; 0 is the default")
    return tokens


@dataclass(frozen=True)
class Refitting:
    """How the remaining experts are fitted to the original output."""

    refit: bool = True
    refit_tokens: int = 0

    def repair(self, router: str) -> Repair | None:
        """Return how to refit, or None for not at all.

        The residual constant and map are left out of sliced checkpoints, since upstream, which loads those, lacks them.
        """
        if not self.refit:
            refuse_idle(self, "with ⟨no_refit⟩", "refit_tokens")
        beyond = router != "slice"
        return Repair(constant=beyond, linear=beyond, tokens=self.refit_tokens) if self.refit else None


@dataclass(frozen=True)
class AutomaticProfile:
    """How the checkpoint is profiled where no profile of it is at hand."""

    calibration_cfg: float | None = None
    calibration_steps: int | None = None
    calibration_images: int | None = None
    calibration_data: Path | None = None
    calibration_classes: tuple[int, ...] | None = None
    calibration_seed: int | None = None

    def wanted(
        self, checkpoint: Checkpoint, measuring: Measuring, beside: Path, *, measures: bool = True
    ) -> ProfileRequest:
        """Return what is asked of a checkpoint's profile; a new one is kept in the folder `beside`.

        Without `measures`, as for dry runs, its dtype is chosen without computing anything.
        """
        wanted = WantedCalibration(
            images=self.calibration_images,
            steps=self.calibration_steps,
            cfg=self.calibration_cfg,
            seed=self.calibration_seed,
            classes=self.calibration_classes,
            dtype=None if measuring.dtype == AUTO else parse_dtype(measuring.dtype),
        )
        return ProfileRequest(
            given=measuring.profile,
            wanted=wanted,
            data=self.calibration_data,
            usual=usual_profiles(checkpoint),
            beside=beside,
            dtype=dtype_on(measuring.dtype, measuring.device, measures),
        )


AnyProfile = str | Path | RoutingProfile
"""A routing profile: its path, or what `read_profile` returned."""


def profile_path(profile: AnyProfile | None) -> Path | None:
    """Return the file of a profile; None for none."""
    if profile is None:
        return None
    return profile.path if isinstance(profile, RoutingProfile) else Path(profile)


def automatic_profile(
    cfg: float | None,
    steps: int | None,
    images: int | None,
    data: str | Path | None,
    classes: Sequence[int] | None,
    seed: int | None,
) -> AutomaticProfile:
    """Return how a checkpoint is profiled where no profile of it is at hand."""
    path = None if data is None else Path(data)
    return AutomaticProfile(cfg, steps, images, path, tuple_of(classes), seed)
