"""The output of healing, from headers alone: the student's layout, with trained weights in the places of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ditmoe_cli.compression.output import Computed, Copied, PlannedOutput, PlannedTensor
from ditmoe_cli.compression.recorded import fixed
from ditmoe_cli.compression.training.error_bins import BINS
from ditmoe_cli.files.provenance import Step
from ditmoe_cli.model.checkpoint import Checkpoint


def healed_output(
    student: Checkpoint,
    trained: Collection[str],
    request: str,
    options: Mapping[str, Any],
    calibration: Mapping[str, Any],
) -> PlannedOutput:
    """Return the layout of a healed student, whose tensors `trained` are computed; its errors are yet to be measured.

    `request` is the digest of what was asked for, `options` what was given, `calibration` the profile's settings.
    """
    computed = set(trained)
    tensors = tuple(
        PlannedTensor(info, Computed() if info.name in computed else Copied(info.name))
        for info in student.header.tensors.values()
    )
    base = student.provenance()
    step = Step(
        command="heal",
        source=student.fingerprint,
        plan=request,
        options=options,
        measured=recorded_errors((0.0, 0.0), (0.0,) * BINS, (0.0,) * BINS),
        request=request,
        calibration=calibration,
    )
    return PlannedOutput(None, tensors, student.config, replace(base, history=(*base.history, step)))


def recorded_errors(
    held: tuple[float, float], before: Sequence[float], after: Sequence[float]
) -> Mapping[str, Sequence[str]]:
    """Return errors on held-out states as provenance keeps them: before and after, of all and by step bin."""
    return {"held_error": fixed(held), "held_error_before": fixed(before), "held_error_after": fixed(after)}


def with_errors(planned: PlannedOutput, errors: Mapping[str, Sequence[str]]) -> PlannedOutput:
    """Return the layout with errors that were measured; its bytes are as many."""
    *before, last = planned.provenance.history
    history = (*before, last.with_measured(errors))
    return replace(planned, provenance=replace(planned.provenance, history=history))
