"""What is asked of distilling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ditmoe_cli.api.training_requests import TrainingOptions
from ditmoe_cli.api.training_runs import Training, check_pair
from ditmoe_cli.compression.distill.distilling import DEFAULT_STUDENT_STEPS, Distilling, States
from ditmoe_cli.compression.distill.distilling_trainer import DistillingTrainer
from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Teaching(TrainingOptions):
    """Which steps are learned of what, for how long."""

    steps: int = DEFAULT_STUDENT_STEPS
    cfg: float = 1.0
    iterations: int | None = None
    teacher_steps: int | None = None
    states: str = "teacher"
    progressive: bool = False

    def request(self, original: Checkpoint, guide: Guide | None) -> Distilling:
        """Return what is asked for, of an original that `guide` guides. Raises `UsageError` for values out of range."""
        return Distilling(
            **self.fields(original, self.iterations),
            steps=self.steps,
            cfg=self.cfg,
            guide=guide,
            teacher_steps=self.teacher_steps,
            states=cast(States, self.states),
            progressive=self.progressive,
        )


def distilling_training(
    asked: Distilling, student: Checkpoint, original: Checkpoint, output: Output, weak: Checkpoint | None
) -> Training:
    """Return a distillation to be run, of an original that `weak` guides. Raises for a pair that cannot be so."""
    trainer = DistillingTrainer(asked, weak)
    check_pair(trainer, student, original)
    inputs = [weak.path] if weak is not None else []
    return Training(student, output, trainer, original, inputs=inputs)
