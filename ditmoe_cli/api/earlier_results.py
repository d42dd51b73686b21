"""Results that are there already: a stage whose output was made by the same request from the same input is not run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditmoe_cli.api.step_texts import step_text
from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.compression.planner import is_answered, is_same_but_for_profile
from ditmoe_cli.compression.recorded import CLOCK, recorded_plan
from ditmoe_cli.errors import BadInputError, OutputExistsError
from ditmoe_cli.files.provenance import Step
from ditmoe_cli.files.staging import check_target
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint


def made_before(
    output: Output, source: Checkpoint, request: str | None, plan: CompressionPlan | None = None
) -> Checkpoint | None:
    """Return what stands at `output` if it is up to date: made by the same request, by `plan` if given, and whole.

    Without a request it is up to date as a copy of `source`. None where nothing stands there, or it is to be replaced.
    Raises `OutputExistsError` with the reason where it is not up to date, and what `check_target` raises.
    """
    check_target(output.path, True, [source.path])
    if output.force or not output.path.exists():
        return None
    made = _opened(output)
    reason = "" if made is None else _other_request(made, source, request, plan) or output.damage(made.hashes)
    if made is not None and not reason:
        return made
    raise OutputExistsError(
        f"{output.path}: exists already{f', and {reason}' if reason else ''}; give ⟨force⟩ to replace it, or "
        "⟨output⟩ for another name"
    )


def _opened(output: Output) -> Checkpoint | None:
    """Return the checkpoint at an output; None where there is none that such an output could be."""
    if output.is_file != output.path.is_file():
        return None
    try:
        return open_checkpoint(output.path)
    except BadInputError:
        return None


def _other_request(
    made: Checkpoint, source: Checkpoint, request: str | None, plan: CompressionPlan | None
) -> str | None:
    """Return how a checkpoint was made otherwise; None where it was made by the same request."""
    history = made.provenance().history
    if request is None:
        is_copy = made.header.provenance == source.provenance() and made.fingerprint == source.fingerprint
        return None if is_copy else "is no copy of this input"
    if not history:
        return "was not made by ditmoe"
    step = history[-1]
    if is_answered(request, step.request) and (plan is None or step.plan == plan.digest):
        return None
    if step.source != source.fingerprint:
        return f"was made from another input, by {step_text(step)}"
    if plan is None and step.request is not None and is_same_but_for_profile(request, step.request):
        return f"was made with another profile of the same settings: {step_text(step)}"
    return f"was made by another request: {step_text(step)}"


def require_clock(made: Checkpoint, clock: tuple[int, ...] | None) -> None:
    """Raise `OutputExistsError` where the clock chose otherwise, for what was trained before, than is given."""
    chosen = tuple(map(int, last_step(made).measured.get(CLOCK, ())))
    if clock is not None and chosen != clock:
        told = ",".join(map(str, chosen)) or "none"
        raise OutputExistsError(
            f"{made.path}: exists already, and was trained by another ⟨clock⟩ ({told}); "
            "give ⟨force⟩ to replace it, or ⟨output⟩ for another name"
        )


def last_step(made: Checkpoint) -> Step:
    """Return the step that made a checkpoint."""
    return made.provenance().history[-1]


def plan_of(made: Checkpoint, source: Checkpoint) -> CompressionPlan:
    """Return what is recorded of the plan that `made` was made by."""
    return recorded_plan(last_step(made), source, made)


def measured_errors(step: Step) -> Mapping[str, Any]:
    """Return the errors that a step recorded, one a block as lists."""
    lists = ("refit_error", "top_k_agreement")
    return {
        name: [float(text) for text in texts] if name in lists else float(texts[0])
        for name, texts in step.measured.items()
        if texts and name != CLOCK
    }
