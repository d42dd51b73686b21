"""The output of training, from headers alone: the student's layout, with trained weights in the places of its own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ditmoe_cli.compression.output import Computed, Copied, PlannedOutput, PlannedTensor
from ditmoe_cli.files.making import computed_here
from ditmoe_cli.files.provenance import Distilled, Step
from ditmoe_cli.model.checkpoint import Checkpoint


def trained_output(
    student: Checkpoint, trained: Collection[str], step: Step, distilled: Distilled | None = None
) -> PlannedOutput:
    """Return the layout of a trained student, whose tensors `trained` are computed.

    `step` is added to its history; where it was `distilled`, that tells by which few steps it is sampled.
    """
    computed = set(trained)
    tensors = tuple(
        PlannedTensor(info, Computed() if info.name in computed else Copied(info.name))
        for info in student.header.tensors.values()
    )
    base = student.provenance()
    few = base.distilled if distilled is None else distilled
    history = (*base.history, replace(step, made=computed_here(dtype="", processes=1)))
    return PlannedOutput(None, tensors, student.config, replace(base, history=history, distilled=few))
