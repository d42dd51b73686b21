"""The contract between planners and the command line. Torch-free.

A planner is a frozen dataclass that holds a request, such as `Pruning`, and turns it into a `CompressionPlan`.
The command line serves all planners alike: it checks, finds or makes the profile, plans, and then previews or writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ditmoe_cli.compression.plan import CompressionPlan, Repair, Rounding
from ditmoe_cli.files.fingerprint import digest
from ditmoe_cli.files.workfolder import WorkFolder
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.effort import Estimate
from ditmoe_cli.routing.profile import RoutingProfile
from ditmoe_cli.version import __version__


@dataclass(frozen=True)
class Work:
    """The checkpoint to plan for, and the means to do so.

    Attributes:
        checkpoint: the checkpoint to compress.
        output: where the result will be written.
        device: returns the device to measure on, checked; only planners that measure call it, since it takes torch.
        note: tells the user what a plan would not show.
        calibration: returns the settings of the calibration that the plan will rest on, which its result's history
            keeps; None where it rests on none.
        folder: keeps what planning has measured, for a run that goes on; None where nothing is kept.
    """

    checkpoint: Checkpoint
    output: Output
    device: Callable[[], str]
    note: Callable[[str], None] = lambda _: None
    calibration: Callable[[], Mapping[str, Any] | None] = lambda: None
    folder: WorkFolder | None = None


def label_of(*parts: object) -> str:
    """Return the ending of a default output's name: the parts that there are, joined by hyphens.

    Parts are what was asked for and every other setting that changes the result, where it is not the default: outputs
    of different commands then have different names.
    """
    return "-".join(str(part) for part in parts if part)


def repair_label(repair: Repair | None) -> str:
    """Return how kept weights are refitted, as part of a name; nothing for the default."""
    return label_of(repair is None and "norefit", repair and repair.scale and "scale", tokens_label(repair))


def tokens_label(fitted: Repair | Rounding | None) -> str:
    """Return the number of calibration tokens that was asked for, as part of a name."""
    return f"tokens{fitted.tokens}" if fitted and fitted.tokens else ""


_HALF = 32  # hexadecimal digits
_UNKNOWN = "0" * _HALF


def request_digest(
    planner: object, source: str, calibration: Mapping[str, Any] | None, profile: str | None = None
) -> str:
    """Return the digest of what is asked of a planner, by which a result is known to be the same without planning.

    The first half is of the planner's fields but `label` and `clock`, the fingerprint of the checkpoint `source`, the
    settings of the calibration that the plan rests on (None for none), and the version of the package. The second half
    is that of the digest `profile` of the profile itself, zeros where there is none, or not yet.
    """
    fields = {name: value for name, value in asdict(planner).items() if name not in ("label", "clock")}  # type: ignore[call-overload]
    kind = type(planner).__name__
    asked = digest(
        {"version": __version__, "planner": kind, "fields": fields, "source": source, "calibration": calibration}
    )
    return asked[:_HALF] + (_UNKNOWN if profile is None else profile[:_HALF])


def is_answered(request: str, made: str | None) -> bool:
    """Return whether a result of the request `made` answers `request`: by any profile where that is not yet made."""
    if made is None:
        return False
    return made == request or (request.endswith(_UNKNOWN) and is_same_but_for_profile(request, made))


def is_same_but_for_profile(one: str, other: str) -> bool:
    """Return whether two requests differ in the profile at most."""
    return one[:_HALF] == other[:_HALF]


class Planner(Protocol):
    """A command's request, ready to become a plan."""

    @property
    def command(self) -> str:
        """The command that plans, such as ``prune``."""

    @property
    def label(self) -> str:
        """The ending of the default output's name, such as ``prune-keep0.5``."""

    @property
    def needs_profile(self) -> bool:
        """Whether planning, or carrying the plan out, takes a routing profile."""

    @property
    def measures(self) -> bool:
        """Whether planning takes weights and states, and so long that its plan is kept; by default not."""
        return False

    @property
    def clock(self) -> tuple[int, ...] | None:
        """What an earlier run of the same training chose by the clock; by default nothing."""
        return None

    def check(self, work: Work) -> None:
        """Raise the error of whatever cannot be done to the checkpoint, before anything is profiled."""

    def warnings(self, profile: RoutingProfile) -> Iterable[str]:
        """Return warnings about a profile that is about to be planned with; by default none."""
        del profile
        return ()

    def estimates(self, work: Work, cfg: float) -> list[Estimate]:
        """Return what planning takes beside profiling, calibrated at a guidance scale; by default next to nothing."""
        del work, cfg
        return []

    def plan(self, work: Work, profile: RoutingProfile | None) -> CompressionPlan:
        """Return the plan. `profile` is None only for planners that need none."""

    def undecided(self, checkpoint: Checkpoint) -> CompressionPlan:
        """Return a plan of the right size, for a dry run without a profile.

        Raises `BadInputError` where the size depends on the profile.
        """

    def least_bytes(self, work: Work) -> int:
        """Return bytes that the result will take at least where its size rests on the profile; by default 0."""
        del work
        return 0

    def judged(self, work: Work, profile: RoutingProfile, plan: CompressionPlan, written: Path) -> Mapping[str, Any]:
        """Return what is measured of a plan and its written result, for the command's result; by default nothing."""
        del work, profile, plan, written
        return {}

    def closing(self, judged: Mapping[str, Any]) -> str | None:
        """Return the line that the command ends with, of what `judged` returned; by default none."""
        del judged
        return None

    def details(self, checkpoint: Checkpoint, plan: CompressionPlan) -> Mapping[str, Any]:
        """Return what the plan does, for the command's result."""
