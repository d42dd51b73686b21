"""The contract between what trains a checkpoint towards another and the command line. Torch-free.

A trainer is a frozen dataclass that holds a request. The command line serves all trainers alike: it checks, foretells,
previews, trains, and writes the student's layout with trained values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ditmoe_cli.compression.output import PlannedOutput
from ditmoe_cli.compression.training.trained_tensors import TrainedTensor
from ditmoe_cli.compression.training.training_request import TrainingRequest
from ditmoe_cli.files.provenance import Step
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.effort import Estimate

if TYPE_CHECKING:
    from ditmoe_cli.compression.training.training_session import TrainingWork


class Record(Protocol):
    """What training has done, as the history of its output keeps it."""

    def to_json(self) -> dict[str, Any]:
        """Return the record as a result holds it."""


class Trainer(Protocol):
    """What trains."""

    @property
    def asked(self) -> TrainingRequest:
        """The request."""

    def check(self, student: Checkpoint, original: Checkpoint) -> Iterable[str]:
        """Return lines to tell. Raises for a pair that cannot be trained so."""

    def tensors(self, student: Checkpoint) -> dict[str, TrainedTensor]:
        """Return the stored tensors that are trained. Raises for none."""

    def estimates(
        self, student: Checkpoint, original: Checkpoint, tensors: Mapping[str, TrainedTensor]
    ) -> list[Estimate]:
        """Return what each phase takes."""

    def output(
        self,
        student: Checkpoint,
        tensors: Mapping[str, TrainedTensor],
        request: str,
        record: Record | None = None,
    ) -> PlannedOutput:
        """Return the layout of the output; without a record, of what was done, it has as many bytes."""

    def recorded(self, step: Step) -> Record:
        """Return what the step that made an output tells of training."""

    def trained(self, work: TrainingWork) -> Record:
        """Train, and keep all trained tensors, as they are written, in the work folder."""
