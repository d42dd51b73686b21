"""The way that all commands take that write checkpoints: choose a plan, then preview it or write its result."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from ditmoe_cli.cli.calibration_options import AutomaticProfile
from ditmoe_cli.cli.costs import error_rows, facts, plan_rows
from ditmoe_cli.cli.foretelling import estimate_of, estimate_row, foretell
from ditmoe_cli.cli.options import Destination, Planning, Source, checked_device
from ditmoe_cli.cli.stage import Stage, open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit, human_bytes, note
from ditmoe_cli.compression.apply import apply, applying_key
from ditmoe_cli.compression.estimates import carrying_out, profiling_estimate
from ditmoe_cli.compression.methods import METHODS
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.compression.planner import Planner, Work
from ditmoe_cli.files.staging import check_target
from ditmoe_cli.files.workfolder import WorkFolder, open_work
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.effort import Estimate
from ditmoe_cli.model.throughput import known_rate, likely_device
from ditmoe_cli.routing.calibrate import made_profile
from ditmoe_cli.routing.profile import RoutingProfile
from ditmoe_cli.routing.profile_search import ProfileRequest, search


def print_methods(command: str, printing: Printing) -> None:
    """Print each method of a command with its summary and source."""
    methods = METHODS[command]
    result = {name: {"summary": method.summary, "source": method.source} for name, method in methods.items()}
    rows = [(name, f"{method.summary} ({method.source})") for name, method in methods.items()]
    emit(printing, Stage().to_json({"methods": result}), rows, None)


@dataclass(frozen=True)
class Job:
    """A command at work: its name, the stage it starts from, the opened checkpoint, where the results go, its start."""

    command: str
    stage: Stage
    checkpoint: Checkpoint
    output: Output
    printing: Printing
    started: float = field(default_factory=time.monotonic)


def run_planner(
    planner: Planner,
    planning: Planning,
    automatic: AutomaticProfile,
    source: Source,
    to: Destination,
    printing: Printing,
) -> None:
    """Plan for the source, and then preview or write the result."""
    stage = source.stage()
    checkpoint = open_stage(stage)
    output = to.at(checkpoint.path, planner.label)
    job = Job(planner.command, stage, checkpoint, output, printing)
    work = Work(checkpoint, output, lambda: checked_device(planning.device), note)
    request = automatic.request(stage, checkpoint, planning.profile_for(stage), output.path.parent)
    plan, profile, before = choose(planner, work, request, to.dry_run)
    if to.dry_run:
        return preview(job, plan, planning.device, before)
    return write(job, plan, profile, work.device, planner.details(checkpoint, plan))


def choose(
    planner: Planner, work: Work, request: ProfileRequest, dry_run: bool
) -> tuple[CompressionPlan, RoutingProfile | None, list[Estimate]]:
    """Return the plan, the profile that it rests on, and what making both takes, which is told before.

    The checkpoint is profiled where that is needed. What cannot be done is refused before the first expensive step. A
    dry run never profiles: without a profile its plan is undecided.
    """
    if not planner.needs_profile:
        request.refuse_settings(f"{planner.command} as asked for")
        planner.check(work)
        return planner.plan(work, None), None, []
    found = cache(lambda: search(work.checkpoint, request, note))
    work = replace(work, calibration=lambda: found().settings)
    planner.check(work)
    basis = found()
    cfg = float(basis.settings["cfg"])
    profiled = [profiling_estimate(work.checkpoint.config, basis.calibration)] if basis.calibration is not None else []
    measured = planner.estimates(work, cfg)
    if dry_run:
        usable = basis.profile
        foretell(measured if usable else [], work.device)
        plan = planner.plan(work, usable) if usable else planner.undecided(work.checkpoint)
        return replace(plan, calibration=basis.settings), usable, [*profiled, *measured]
    target, inputs = work.output.path, [work.checkpoint.path, *([basis.profile.path] if basis.profile else [])]
    check_target(target, work.output.force, inputs)
    foretell([*profiled, *measured], work.device)
    profile = made_profile(work.checkpoint, basis, work.device, note)
    for warning in planner.warnings(profile):
        note(f"warning: {warning}")
    plan = replace(planner.plan(work, profile), calibration=profile.calibration)
    return plan, profile, [*profiled, *measured]


def preview(job: Job, plan: CompressionPlan | None, device: str = "cpu", before: Sequence[Estimate] = ()) -> None:
    """Print a plan (None: a plain copy), the exact bytes that carrying it out would write, and what it would take.

    `before` is what choosing the plan takes. Writes nothing, and refuses what writing would. An undecided plan has the
    right size only, and is not printed.
    """
    output = job.output
    check_target(output.path, output.force, [job.checkpoint.path])
    size = planned_output(job.checkpoint, plan).predicted_bytes(output)
    result = _sizes(job.checkpoint, size)
    estimates, rate = [*before, *carrying_out(job.checkpoint, plan, size)], known_rate(likely_device(device))
    result["estimate"] = estimate_of(estimates, rate)
    result["dry_run"] = True
    result["plan"] = plan.document() if plan is not None and plan.decided else None
    told = plan_rows(plan, job.checkpoint) + error_rows(plan.options) if plan is not None and plan.decided else []
    rows = [("would write", output.path), *told, *_size_rows(result), estimate_row(estimates, rate)]
    emit(job.printing, job.stage.to_json(result), rows, str(output.path), editable=True)


def write(
    job: Job,
    plan: CompressionPlan | None,
    profile: RoutingProfile | None = None,
    device: Callable[[], str] = lambda: "cpu",
    details: Mapping[str, Any] | None = None,
) -> None:
    """Carry a plan out (None: a plain copy) and print the result. `device` is asked for where weights are computed."""
    place = device() if plan is not None and plan.computes else "cpu"
    size = planned_output(job.checkpoint, plan).predicted_bytes(job.output)
    foretell(carrying_out(job.checkpoint, plan, size), lambda: place)
    with _work_folder(job, plan, profile, place) as work:
        applied = apply(job.checkpoint, plan, job.output, profile, place, work)
    sizes, known = _sizes(job.checkpoint, applied.bytes), facts(plan, job.checkpoint) if plan is not None else {}
    digest = plan.digest if plan else None
    measured, seconds = applied.measured.to_json(), round(time.monotonic() - job.started, 1)
    result = {**sizes, **known, **(details or {}), "plan_digest": digest, **measured, "seconds": seconds}
    options = plan.options if plan else {}
    paths = {"profile": profile.path} if profile else {}
    stage = job.stage.done(job.command, options, checkpoint=job.output.path, samples=None, **paths)
    costs = [*error_rows(result), *_size_rows(result), ("seconds", f"{seconds:,.1f}")]
    rows = [("wrote", job.output.path), *(plan_rows(plan, job.checkpoint) if plan else []), *costs]
    emit(job.printing, stage.to_json(result), rows, str(job.output.path))
    if sys.stderr.isatty() and not (job.printing.is_text or job.printing.quiet):  # as in a pipe on a terminal
        note(f"{job.command}: " + "; ".join(f"{label} {value}" for label, value in costs))


def _work_folder(
    job: Job, plan: CompressionPlan | None, profile: RoutingProfile | None, device: str
) -> AbstractContextManager[WorkFolder | None]:
    """Return the work folder of a plan that computes weights; None for any other."""
    if plan is None or profile is None or not plan.computes:
        return nullcontext()
    return open_work(job.output.path, applying_key(plan, profile, device), note)


def _sizes(checkpoint: Checkpoint, size: int) -> dict[str, Any]:
    before = checkpoint.header.file_bytes
    return {"bytes": size, "bytes_before": before, "ratio": size / before}


def _size_rows(result: Mapping[str, Any]) -> list[Row]:
    before, after = result["bytes_before"], result["bytes"]
    return [("bytes", f"{before:,} -> {after:,} ({human_bytes(after)}, {result['ratio']:.3f} of the input)")]
