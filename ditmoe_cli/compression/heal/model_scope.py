"""Healing end to end: all blocks at once, on the guided prediction.

The loss of a state is w_b ‖s v_c - (s - 1) v_u - v_T‖² / E, b being its step bin: bins in which the student is far off
before training count less each, so that no noise level is sacrificed to another (`bin_weights`). E is the mean ‖v_T‖²
of held-out states.

Takes both models, what training takes of each trained weight (`training_loop`), and the activations of the states of a
batch that are computed at once, in all blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditmoe_cli.compression.training.fitting_batches import FittingBatches
from ditmoe_cli.compression.training.low_rank_updates import Updates
from ditmoe_cli.compression.training.prediction_error import (
    JudgedErrors,
    bin_weights,
    bins_of,
    judged_errors,
    state_errors,
)
from ditmoe_cli.compression.training.teacher_states import StateSource, TeacherStates
from ditmoe_cli.compression.training.training_loop import BARE, CourseOf, Means, Objective, train
from ditmoe_cli.model.dit import DiTMoE

BALANCE = 0.5  # strength of the weights of bins
_TINY = 1e-30


@dataclass(frozen=True)
class ModelHealed:
    """The result of healing end to end: the steps of its course, and errors on held-out states after it."""

    steps: int
    after: JudgedErrors


def heal_model(
    student: DiTMoE,
    updates: Updates,
    source: StateSource,
    held: TeacherStates,
    before: JudgedErrors,
    course: CourseOf,
    batch: FittingBatches,
    means: Means = BARE,
    balance: float = BALANCE,
) -> ModelHealed:
    """Train some weights of a student on states of `source`, and leave the best `updates` of them.

    `before` are the errors of the weights as they are, and `course` returns how they are trained. Values that are
    judged, and left, are rounded to what is written of them. States are judged in batches.
    """
    family, device, exchange = student.config.sampler, student.device, means.exchange
    scale = max(sum(before.references) / len(held), _TINY)
    by_bin = bin_weights(before, balance).div(scale).to(device)

    def losses(rows: Tensor) -> Tensor:
        states = source.at(rows)
        return state_errors(student, states) * by_bin[bins_of(states.t, family).to(device)]

    def judge() -> float:
        updates.round()
        return judged_errors(student, held, batch, exchange).error

    objective = Objective(len(source), losses, judge)
    weights = updates.trained()
    chosen = course(weights, objective)
    train(weights, objective, chosen, "healing the model", means, updates.stepping())
    return ModelHealed(chosen.steps, judged_errors(student, held, batch, exchange))
