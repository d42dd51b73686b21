"""The planner of differences: nothing is chosen but how they are stored. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ditmoe_cli.compression.delta.delta_sizes import delta_tensors
from ditmoe_cli.compression.plan import UNDECIDED, CompressionPlan, Differences
from ditmoe_cli.compression.planner import Planner, Work
from ditmoe_cli.formats.differences import DeltaFormat
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.profile import RoutingProfile, require_profile_of

# bytes of ternary codes do not depend on the density: the default is near the least error on bell-shaped differences
DEFAULT_RATIOS: Mapping[DeltaFormat, float] = {"svd": 0.25, "ternary": 0.5}


@dataclass(frozen=True)
class Differencing(Planner):
    """The planner that keeps every expert, stored as a difference from its block's base."""

    stage: Differences
    command: ClassVar[str] = "merge"
    needs_profile: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """The ending of the default output's name."""
        return f"merge-{self.stage.kind}{self.stage.ratio:g}"

    def check(self, work: Work) -> None:
        """Refuse experts that cannot share a base, and ratios that leave nothing; see `delta_tensors`."""
        delta_tensors(work.checkpoint, self.stage)

    def plan(self, work: Work, profile: RoutingProfile | None) -> CompressionPlan:
        """Return the plan; see `plan_delta`."""
        return plan_delta(work.checkpoint, self.stage, profile)

    def undecided(self, checkpoint: Checkpoint) -> CompressionPlan:
        """Return the plan without its profile."""
        return plan_delta(checkpoint, self.stage, None)

    def details(self, checkpoint: Checkpoint, plan: CompressionPlan) -> dict[str, Any]:
        """Return how experts are stored."""
        del checkpoint, plan
        return {"delta": asdict(self.stage)}


def plan_delta(checkpoint: Checkpoint, stage: Differences, profile: RoutingProfile | None) -> CompressionPlan:
    """Plan to store every block's experts as one base and differences; without a profile the plan is undecided.

    The profile tells how often experts are selected, and on which tokens, when the plan is carried out. Raises what
    `delta_tensors` raises, and `BadInputError` for a profile of another checkpoint.
    """
    delta_tensors(checkpoint, stage)
    if profile is not None:
        require_profile_of(profile, checkpoint.fingerprint, checkpoint.path)
    options: dict[str, Any] = {"delta": stage.kind, "delta_ratio": stage.ratio}
    return CompressionPlan(
        command="merge",
        source=checkpoint.fingerprint,
        profile=profile.digest if profile else None,
        options=options if profile else {**options, UNDECIDED: True},
        stages=(stage,),
    )
