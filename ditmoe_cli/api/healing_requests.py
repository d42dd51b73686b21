"""What is asked of healing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from ditmoe_cli.api.planning_requests import Measuring
from ditmoe_cli.api.training_requests import TrainingOptions
from ditmoe_cli.api.training_runs import Training, check_pair, telling
from ditmoe_cli.compression.heal.healing import Healing, Scope, check_profile
from ditmoe_cli.compression.heal.healing_trainer import HealingTrainer
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.profile_search import ProfileRequest, search


@dataclass(frozen=True)
class Teaching(TrainingOptions):
    """What is trained towards what, for how long, and in which scope."""

    steps: int | None = None
    scope: str = "auto"

    def request(self, original: Checkpoint) -> Healing:
        """Return what is asked for. Raises `UsageError` for values out of range."""
        return Healing(**self.fields(original, self.steps), scope=cast(Scope, self.scope))


def healing_training(
    asked: Healing,
    student: Checkpoint,
    original: Checkpoint,
    output: Output,
    wanted: ProfileRequest,
    measuring: Measuring,
) -> Training:
    """Return a healing to be run, on the original's profile, which is found or made as is `wanted`.

    Raises for a pair that cannot be healed so, and for a profile without states.
    """
    trainer = HealingTrainer(asked)
    check_pair(trainer, student, original)
    basis = search(original, wanted, telling())
    check_profile(basis.profile, basis.settings)
    return Training(
        student,
        output,
        replace(trainer, settings=basis.settings),
        original,
        measuring.device,
        measuring.dtype,
        basis,
        lambda profile: HealingTrainer(asked, profile.calibration, profile),
    )
