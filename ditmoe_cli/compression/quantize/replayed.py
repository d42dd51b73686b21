"""Our own choice: the formats of least measured error of the guided prediction, all weights sharing one budget."""

from __future__ import annotations

from ditmoe_cli.compression.quantize.planner import Mix, check_budget, solve_mix
from ditmoe_cli.compression.quantize.sensitivity import measure
from ditmoe_cli.compression.quantize.task import Task


def choose(task: Task) -> Mix:
    """Return the mix of least predicted error.

    Raises `InfeasibleError` where the narrowest formats do not fit, before anything is measured.
    """
    check_budget(task.checkpoint, task.formats, task.candidates, task.limit, task.output)
    measurable = {name: tuple(fmt for fmt in formats if fmt) for name, formats in task.formats.items()}
    errors = measure(task.checkpoint, task.profile, measurable, task.device, task.bar).errors
    return solve_mix(task.checkpoint, errors, task.formats, task.candidates, task.limit, task.output)
