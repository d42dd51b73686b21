"""Our own choice: the formats of least measured error of the guided prediction, all weights sharing one budget.

Amplifications are measured with one width everywhere first. The mix that this gives has errors of other sizes, with
other amplifications (`compression.replay.amplification`); so it is tried, and solved again with what the trial
measured. Of both mixes the one of less tried error is taken.
"""

from __future__ import annotations

from dataclasses import replace

from ditmoe_cli.compression.precision.budget import Mix, check_budget, solve_mix
from ditmoe_cli.compression.precision.sensitivity import measure
from ditmoe_cli.compression.precision.task import Task
from ditmoe_cli.compression.precision.trial import trial


def choose(task: Task) -> Mix:
    """Return the mix of least error.

    Raises `InfeasibleError` where the narrowest formats do not fit, before anything is measured.
    """
    check_budget(task.checkpoint, task.formats, task.candidates, task.limit, task.output)
    measurable = {name: tuple(fmt for fmt in formats if fmt) for name, formats in task.formats.items()}
    found = measure(task.checkpoint, task.profile, measurable, task.device, task.bar)
    program = (task.formats, task.candidates, task.limit, task.output)
    first = solve_mix(task.checkpoint, found.errors, *program)
    tried = trial(task.checkpoint, task.profile, first.formats, task.device, task.bar)
    found = found.at(tried.amplification)
    second = solve_mix(task.checkpoint, found.errors, *program)
    again = trial(task.checkpoint, task.profile, second.formats, task.device, task.bar)
    return replace(second, tried=again.error) if again.error <= tried.error else replace(first, tried=tried.error)
