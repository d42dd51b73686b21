"""Healing as a trainer, for the command line. Torch-free until it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditmoe_cli.compression.heal.healed_output import HealingRecord, healed_output, healing_record
from ditmoe_cli.compression.heal.healing import Healing, check_healed, tensors_to_heal
from ditmoe_cli.compression.heal.healing_memory import healing_estimate
from ditmoe_cli.compression.output import PlannedOutput
from ditmoe_cli.compression.training.trained_tensors import TrainedTensor, trained_size
from ditmoe_cli.compression.training.trainer import Record
from ditmoe_cli.files.provenance import Step
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.effort import Estimate
from ditmoe_cli.routing.profile import RoutingProfile

if TYPE_CHECKING:
    from ditmoe_cli.compression.training.training_session import TrainingWork


@dataclass(frozen=True)
class HealingTrainer:
    """Heals (`training.trainer.Trainer`).

    Attributes:
        asked: the request.
        settings: of the calibration that it rests on.
        profile: the routing profile of the original, once it is there.
    """

    asked: Healing
    settings: Mapping[str, Any] | None = None
    profile: RoutingProfile | None = None

    def check(self, student: Checkpoint, original: Checkpoint) -> Iterable[str]:
        """Return a warning where nothing tells that the student was made from the original."""
        warning = check_healed(student, original)
        return () if warning is None else (f"warning: {warning}",)

    def tensors(self, student: Checkpoint) -> dict[str, TrainedTensor]:
        """Return the stored tensors that are trained."""
        return tensors_to_heal(student, self.asked)

    def estimates(
        self, student: Checkpoint, original: Checkpoint, tensors: Mapping[str, TrainedTensor]
    ) -> list[Estimate]:
        """Return what healing takes."""
        size = trained_size(student, tensors)
        return [healing_estimate(student.config, original.config, self.asked, size, self.settings or {})]

    def output(
        self,
        student: Checkpoint,
        tensors: Mapping[str, TrainedTensor],
        request: str,
        record: Record | None = None,
    ) -> PlannedOutput:
        """Return the layout of the output."""
        assert record is None or isinstance(record, HealingRecord)
        return healed_output(student, tensors, request, self.asked, self.settings or {}, record)

    def recorded(self, step: Step) -> HealingRecord:
        """Return what a step tells of healing."""
        return healing_record(step) or HealingRecord()

    def trained(self, work: TrainingWork) -> HealingRecord:
        """Heal, and keep the trained tensors in the work folder."""
        from ditmoe_cli.compression.heal.healed_weights import heal

        assert self.profile is not None
        return heal(work, self.profile, self.asked)
