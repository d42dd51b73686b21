"""The output of healing, from headers alone: the student's layout, with trained weights in the places of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ditmoe_cli.compression.heal.healing import Healing
from ditmoe_cli.compression.output import PlannedOutput
from ditmoe_cli.compression.recorded import CLOCK, fixed, whole
from ditmoe_cli.compression.training.error_bins import BINS
from ditmoe_cli.compression.training.trained_output import trained_output
from ditmoe_cli.files.provenance import Step
from ditmoe_cli.model.checkpoint import Checkpoint

_COURSE = "course"
_ERRORS = ("held_error", "held_error_before", "held_error_after")


@dataclass(frozen=True)
class HealingRecord:
    """What healing has done, as the history of its output keeps it.

    Attributes:
        images: images that were noised.
        block_steps: steps of training of each block; 0 where the model alone was trained.
        model_steps: steps of training end to end; 0 where blocks alone were trained.
        held_error: relative squared error on held-out states, before and after.
        held_error_before, held_error_after: the same by step bin, from noise to image.
        clock: what the clock chose (`training_request.Clock`); nothing where steps were asked for.
    """

    images: int = 0
    block_steps: int = 0
    model_steps: int = 0
    held_error: Sequence[float] = (0.0, 0.0)
    held_error_before: Sequence[float] = (0.0,) * BINS
    held_error_after: Sequence[float] = (0.0,) * BINS
    clock: Sequence[int] = ()

    @property
    def scopes(self) -> list[str]:
        """The scopes that weights were trained in."""
        steps = (("block", self.block_steps), ("model", self.model_steps))
        return [scope for scope, count in steps if count]

    def to_json(self) -> dict[str, Any]:
        """Return the record as a result holds it."""
        lists = {name: list(value) if isinstance(value, Sequence) else value for name, value in asdict(self).items()}
        return {"scopes": self.scopes, **lists}

    def measured(self) -> dict[str, list[str]]:
        """Return the record as provenance holds it, in texts of one width each."""
        errors = {name: fixed(getattr(self, name)) for name in _ERRORS}
        clock = {CLOCK: whole(self.clock)} if self.clock else {}
        return {_COURSE: whole([self.images, self.block_steps, self.model_steps]), **errors, **clock}


def healing_record(step: Step) -> HealingRecord | None:
    """Return what a step of a history tells of healing; None for one of another kind, or that is malformed."""
    if step.command != "heal" or not {_COURSE} <= step.measured.keys() <= {_COURSE, CLOCK, *_ERRORS}:
        return None
    try:
        images, block_steps, model_steps = map(int, step.measured[_COURSE])
        errors = {name: tuple(map(float, step.measured[name])) for name in _ERRORS}
        clock = tuple(map(int, step.measured.get(CLOCK, ())))
        record = HealingRecord(images, block_steps, model_steps, **errors, clock=clock)
    except (ValueError, TypeError, KeyError):
        return None
    lengths = [len(values) for values in (record.held_error, record.held_error_before, record.held_error_after)]
    return record if lengths == [2, BINS, BINS] else None


def healed_output(
    student: Checkpoint,
    trained: Collection[str],
    request: str,
    asked: Healing,
    calibration: Mapping[str, Any],
    record: HealingRecord | None = None,
) -> PlannedOutput:
    """Return the layout of a healed student, whose tensors `trained` are computed.

    `request` is the digest of what was `asked` for, `calibration` are the profile's settings, `record` tells what was
    done; without it the layout has as many bytes.
    """
    step = Step(
        command=asked.command,
        source=student.fingerprint,
        plan=request,
        options=asked.options(),
        measured=(record or HealingRecord(clock=asked.no_clock(len(asked.trainings)))).measured(),
        request=request,
        calibration=calibration,
        defaults=asked.defaults(),
    )
    return trained_output(student, trained, step)
