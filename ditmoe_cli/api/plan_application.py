"""Carrying out a plan that was made before: the profile that it takes, and the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ditmoe_cli.api.devices import checked_device
from ditmoe_cli.api.earlier_results import made_before, require_clock
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.output_names import usual_profiles
from ditmoe_cli.api.planner_runs import Choice, foresee, found_again, unread, write
from ditmoe_cli.api.written_checkpoints import ForeseenCheckpoint, WrittenCheckpoint
from ditmoe_cli.compression.output import check_plan
from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.compression.recorded import request_of
from ditmoe_cli.errors import UsageError
from ditmoe_cli.files.fingerprint import file_digest
from ditmoe_cli.files.staging import check_target
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.profile import read_profile
from ditmoe_cli.routing.profile_search import kept_name


@dataclass(frozen=True)
class Application:
    """A plan to be carried out.

    Attributes:
        plan: what to do.
        checkpoint: to which checkpoint.
        output: where the result goes.
        profile: the routing profile that the plan was made with, where it is known.
        device: to compute weights on.
        inputs: paths that are read beside, such as the plan's.
        clock: what the clock chose for the plan's training in an earlier run; None where it chooses anew.
    """

    plan: CompressionPlan
    checkpoint: Checkpoint
    output: Output
    profile: Path | None = None
    device: str = "auto"
    inputs: Sequence[Path] = ()
    clock: tuple[int, ...] | None = None


def output_label(plan: CompressionPlan) -> str:
    """Return the ending of the default output's name."""
    return f"{plan.command}-{plan.digest[:8]}"


def applied_result(application: Application, *, dry_run: bool = False) -> WrittenCheckpoint | ForeseenCheckpoint:
    """Carry a plan out, or foresee that in a dry run, unless the same was done before."""
    plan, checkpoint, output = application.plan, application.checkpoint, application.output
    if not plan.stages:
        note("warning: the plan changes nothing; the output is a copy")
    path = application.profile
    if path is None and not dry_run:
        path = profile_of_plan(checkpoint, plan, output.path.parent)
    beside = [*application.inputs, *([path] if path is not None else [])]
    check_target(output.path, True, [checkpoint.path, *beside])  # whether it exists is another matter
    if not plan.computes and not dry_run:
        checkpoint = unread(checkpoint, output, plan.source)
    check_plan(checkpoint, plan)
    if application.clock is not None and (plan.retraining is None or plan.retraining.minutes is None):
        raise UsageError("⟨clock⟩ has no effect on a plan that trains nothing by the clock")
    made = made_before(output, checkpoint, request_of(plan), plan)
    if made is not None:
        require_clock(made, application.clock)
        return found_again(checkpoint, output, made, path if plan.computes else None, plan, dry_run=dry_run)
    if dry_run:
        return foresee(checkpoint, output, plan, application.device)
    profile = read_profile(path) if path and plan.computes else None
    device = checked_device(application.device)
    return write(checkpoint, output, Choice(plan, profile, clock=application.clock), lambda: device)


def profile_of_plan(checkpoint: Checkpoint, plan: CompressionPlan, beside: Path) -> Path | None:
    """Return the profile that the plan was made with, under a usual name, or that of a planner's own in `beside`.

    None where none is needed, or there.
    """
    if not plan.computes or plan.profile is None:
        return None
    paths = (*usual_profiles(checkpoint), beside / kept_name(checkpoint, plan.source))
    path = next((p for p in paths if p.is_file() and file_digest(p) == plan.profile), None)
    if path is not None:
        note(f"using the profile {path}, which the plan was made with")
    return path
