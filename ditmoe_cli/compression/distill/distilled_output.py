"""The output of distilling, from headers alone: the student's layout, with trained weights and its few steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from ditmoe_cli.compression.distill.distilling import Distilling
from ditmoe_cli.compression.output import PlannedOutput
from ditmoe_cli.compression.recorded import CLOCK, fixed, whole
from ditmoe_cli.compression.training.trained_output import trained_output
from ditmoe_cli.files.provenance import Step
from ditmoe_cli.model.checkpoint import Checkpoint

_COURSE, _BEFORE, _AFTER = "course", "path_error_before", "path_error_after"


@dataclass(frozen=True)
class DistillingRecord:
    """What distilling has done, as the history of its output keeps it.

    Attributes:
        paths: of the original, that were sampled.
        iterations: steps of training.
        before, after: relative squared errors on held-out paths behind each of the student's steps, the images' last.
        clock: what the clock chose (`training_request.Clock`); nothing where iterations were asked for.
    """

    paths: int = 0
    iterations: int = 0
    before: Sequence[float] = field(default_factory=tuple)
    after: Sequence[float] = field(default_factory=tuple)
    clock: Sequence[int] = ()

    @property
    def held_error(self) -> tuple[float, float]:
        """Relative squared errors of held-out images, before and after."""
        return (self.before[-1], self.after[-1]) if self.before and self.after else (0.0, 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return the record as a result holds it."""
        errors = {_BEFORE: list(self.before), _AFTER: list(self.after)}
        done = {"paths": self.paths, "iterations": self.iterations, "clock": list(self.clock)}
        return {**done, "held_error": list(self.held_error), **errors}


def distilling_record(step: Step) -> DistillingRecord | None:
    """Return what a step of a history tells of distilling; None for one of another kind, or that is malformed."""
    if step.command != Distilling.command or not {_COURSE, _BEFORE, _AFTER} <= step.measured.keys():
        return None
    try:
        paths, iterations = map(int, step.measured[_COURSE])
        before, after = (tuple(map(float, step.measured[name])) for name in (_BEFORE, _AFTER))
        clock = tuple(map(int, step.measured.get(CLOCK, ())))
    except (ValueError, TypeError):
        return None
    return DistillingRecord(paths, iterations, before, after, clock) if len(before) == len(after) > 0 else None


def distilled_output(
    student: Checkpoint, trained: Collection[str], request: str, asked: Distilling, record: DistillingRecord | None
) -> PlannedOutput:
    """Return the layout of a distilled student, whose tensors `trained` are computed.

    `request` is the digest of what was asked for, `record` what was done, without which it has as many bytes.
    """
    family = student.config.sampler
    zeros, few = (0.0,) * asked.steps, asked.distilled(family)
    done = record or DistillingRecord(before=zeros, after=zeros, clock=asked.no_clock(len(asked.trainings(family))))
    measured = {_COURSE: whole([done.paths, done.iterations]), _BEFORE: fixed(done.before), _AFTER: fixed(done.after)}
    if done.clock:
        measured[CLOCK] = whole(done.clock)
    step = Step(
        command=asked.command,
        source=student.fingerprint,
        plan=request,
        options=asked.options(),
        measured=measured,
        request=request,
        defaults={**asked.defaults(), **({} if asked.teacher_steps else {"teacher_steps": few.teacher_steps})},
    )
    return trained_output(student, trained, step, few)
