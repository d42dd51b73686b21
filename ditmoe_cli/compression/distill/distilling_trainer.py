"""Distilling as a trainer, for the command line. Torch-free until it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditmoe_cli.compression.distill.distilled_output import DistillingRecord, distilled_output, distilling_record
from ditmoe_cli.compression.distill.distilling import Distilling, check_distilled, tensors_to_distill
from ditmoe_cli.compression.distill.distilling_memory import distilling_estimate
from ditmoe_cli.compression.output import PlannedOutput
from ditmoe_cli.compression.training.trained_tensors import TrainedTensor, trained_size
from ditmoe_cli.compression.training.trainer import Record
from ditmoe_cli.files.provenance import Step
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.effort import Estimate

if TYPE_CHECKING:
    from ditmoe_cli.compression.training.training_session import TrainingWork


@dataclass(frozen=True)
class DistillingTrainer:
    """Distils as asked (`training.trainer.Trainer`); `weak` is the checkpoint that guides the original, if one does."""

    asked: Distilling
    weak: Checkpoint | None = None

    def check(self, student: Checkpoint, original: Checkpoint) -> Iterable[str]:
        """Return a warning where nothing tells that the student was made from the original."""
        warning = check_distilled(student, original, self.asked, self.weak)
        return () if warning is None else (f"warning: {warning}",)

    def tensors(self, student: Checkpoint) -> dict[str, TrainedTensor]:
        """Return the stored tensors that are trained."""
        return tensors_to_distill(student, self.asked)

    def estimates(
        self, student: Checkpoint, original: Checkpoint, tensors: Mapping[str, TrainedTensor]
    ) -> list[Estimate]:
        """Return what distilling takes."""
        size = trained_size(student, tensors)
        return [distilling_estimate(student.config, original.config, self.asked, size)]

    def output(
        self,
        student: Checkpoint,
        tensors: Mapping[str, TrainedTensor],
        request: str,
        record: Record | None = None,
    ) -> PlannedOutput:
        """Return the layout of the output."""
        assert record is None or isinstance(record, DistillingRecord)
        return distilled_output(student, tensors, request, self.asked, record)

    def recorded(self, step: Step) -> DistillingRecord:
        """Return what a step tells of distilling."""
        return distilling_record(step) or DistillingRecord()

    def trained(self, work: TrainingWork) -> DistillingRecord:
        """Distil, and keep the trained tensors in the work folder."""
        from ditmoe_cli.compression.distill.distilled_weights import distill

        return distill(work, self.asked, self.weak)
