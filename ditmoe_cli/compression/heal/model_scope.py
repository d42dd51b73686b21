"""Healing end to end: all blocks at once, on the guided prediction.

The loss of a state is w_b ‖s v_c - (s - 1) v_u - v_T‖², b being its step bin: bins in which the student is far off
before training count less each, so that no noise level is sacrificed to another (`bin_weights`).

Takes, beside both models, 16 bytes for each trained weight (gradient, AdamW's two moments, averaged and best values
share it), and the activations of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ditmoe_cli.compression.training.prediction_error import (
    JudgedErrors,
    bin_weights,
    bins_of,
    judged_errors,
    state_errors,
)
from ditmoe_cli.compression.training.teacher_states import StateSource, TeacherStates
from ditmoe_cli.compression.training.trained_weights import Stored, rounded_as_stored
from ditmoe_cli.compression.training.training_loop import Course, Objective, Trained, train
from ditmoe_cli.files.workfolder import WorkFolder
from ditmoe_cli.model.dit import DiTMoE

BALANCE = 0.5  # strength of the weights of bins


@dataclass(frozen=True)
class ModelHealed:
    """The result of healing end to end: the loop's, and errors on held-out states before and after."""

    trained: Trained
    before: JudgedErrors
    after: JudgedErrors


def heal_model(
    student: DiTMoE,
    weights: dict[str, Tensor],
    source: StateSource,
    held: TeacherStates,
    course: Course,
    stored: Stored,
    work: WorkFolder | None = None,
    note: Callable[[str], None] = lambda _: None,
    balance: float = BALANCE,
) -> ModelHealed:
    """Train some `weights` of a student, by name, on states of `source`, and leave the best values in them.

    The values that are judged, and left, are rounded to what is `stored` of them.
    """
    family, device = student.config.sampler, student.device
    before = judged_errors(student, held, course.batch)
    by_bin = bin_weights(before, balance).to(device)

    def losses(rows: Tensor) -> Tensor:
        states = source.at(rows)
        scale = states.targets.square().flatten(1).sum(dim=1).mean()
        return state_errors(student, states) * by_bin[bins_of(states.t, family).to(device)] / scale

    def judge() -> float:
        rounded_as_stored(weights, stored)
        return judged_errors(student, held, course.batch).error

    trained = train(weights, Objective(len(source), losses, judge), course, "healing the model", work, note)
    return ModelHealed(trained, before, judged_errors(student, held, course.batch))
