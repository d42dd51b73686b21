"""The way that all commands take that write checkpoints: have the result made or foreseen, and print it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ditmoe_cli.api.argument_checks import refuse_idle
from ditmoe_cli.api.foretelling import estimate_row
from ditmoe_cli.api.planner_runs import Choice, PlannerRun, chosen_alone, foreseen_result, laid_out, planned_result
from ditmoe_cli.api.written_checkpoints import ForeseenCheckpoint, WrittenCheckpoint
from ditmoe_cli.cli.calibration_options import AutomaticProfile
from ditmoe_cli.cli.costs import error_rows, plan_rows
from ditmoe_cli.cli.options import Destination, Measuring, Source
from ditmoe_cli.cli.stage import Stage, open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit, note
from ditmoe_cli.compression.methods import METHODS
from ditmoe_cli.compression.planner import Planner
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.progress import human_bytes


def print_methods(command: str, printing: Printing) -> None:
    """Print each method of a command with its summary and source."""
    methods = METHODS[command]
    result = {name: {"summary": method.summary, "source": method.source} for name, method in methods.items()}
    rows = [(name, f"{method.summary} ({method.source})") for name, method in methods.items()]
    emit(printing, Stage().to_json({"methods": result}), rows, None)


@dataclass(frozen=True)
class Job:
    """A command at work: its name, the stage that it starts from, the opened checkpoint, where the results go."""

    command: str
    stage: Stage
    checkpoint: Checkpoint
    output: Output
    printing: Printing


def run_planner(
    planner: Planner,
    planning: Measuring,
    automatic: AutomaticProfile,
    source: Source,
    to: Destination,
    printing: Printing,
    *,
    plan_only: bool = False,
) -> None:
    """Plan for the source, and then preview or write the result; with `plan_only` print the plan that was chosen."""
    if plan_only:
        refuse_idle(to, "with --plan-only, which writes no checkpoint", "force", "dry_run")
    stage = source.stage()
    checkpoint = open_stage(stage)
    output = to.at(checkpoint.path, planner.label)
    job = Job(planner.command, stage, checkpoint, output, printing)
    wanted = automatic.request(stage, checkpoint, planning, output.path.parent, measures=not to.dry_run)
    run = PlannerRun(planner, checkpoint, output, wanted, planning.device)
    if plan_only:
        with chosen_alone(run) as choice:
            return show_plan(job, choice, planning.device)
    if to.dry_run:
        return show_result(job, foreseen_result(run), dry_run=True)
    result = planned_result(run)
    show_written(job, result)
    closing = None if result.up_to_date else planner.closing(result.figures)
    if closing is not None:
        note(closing)
    return None


def show_result(job: Job, result: ForeseenCheckpoint | WrittenCheckpoint, *, dry_run: bool) -> None:
    """Print what was written or would be."""
    if isinstance(result, ForeseenCheckpoint):
        return show_foreseen(job, result)
    return show_written(job, result, dry_run=dry_run)


def show_foreseen(job: Job, result: ForeseenCheckpoint) -> None:
    """Print what would be written: bytes, estimate and plan; an undecided plan has the right size only, and is not."""
    document = job.stage.to_json({**result.to_json(), "dry_run": True})
    rows: list[Row] = [("would write", job.output.path), *_foreseen_rows(job, result)]
    emit(job.printing, document, rows, str(job.output.path), editable=True)


def show_plan(job: Job, choice: Choice, device: str = "cpu") -> None:
    """Print a plan that was chosen, as a dry run does; what the pipe goes on with is the checkpoint as it is."""
    result = laid_out(job.checkpoint, job.output, choice.plan, device)
    stage = job.stage if choice.profile is None else replace(job.stage, profile=str(choice.profile.path.absolute()))
    document = stage.to_json({**result.to_json(), "plan_only": True})
    emit(job.printing, document, _foreseen_rows(job, result), None, editable=True)


def _foreseen_rows(job: Job, result: ForeseenCheckpoint) -> list[Row]:
    """Return plan, bytes and estimate for reading, without what is undecided."""
    plan = result.decided_plan
    told = plan_rows(plan, job.checkpoint) + error_rows(plan.options) if plan is not None else []
    return [*told, *size_rows(result.to_json()), estimate_row(result.estimates, result.rate)]


def show_written(job: Job, result: WrittenCheckpoint, told: Told | None = None, dry_run: bool = False) -> None:
    """Print the result of a stage that was carried out, now or before.

    Options and rows are those of its plan, or what is `told` without one. A dry run says the same of an output that is
    up to date.
    """
    plan = result.plan
    is_planned = told is None
    told = told or (Told(plan.options, plan_rows(plan, job.checkpoint)) if plan else Told())
    document = result.to_json()
    paths = {"profile": result.profile} if result.profile or not is_planned else {}  # what was trained routes anew
    stage = job.stage.done(job.command, told.options, checkpoint=result.path, samples=None, **paths)
    costs: list[Row] = size_rows(document)
    if not result.up_to_date:
        costs = [*(error_rows(document) if is_planned else []), *costs, ("seconds", f"{document['seconds']:,.1f}")]
    document |= {"dry_run": True} if dry_run else {}
    rows = [("up to date" if result.up_to_date else "wrote", result.path), *told.rows, *costs]
    emit(job.printing, stage.to_json(document), rows, str(result.path))
    if is_planned and not result.up_to_date:
        _tell_costs(job, costs)


def _tell_costs(job: Job, costs: Sequence[Row]) -> None:
    """Say on a terminal what a stage cost whose result goes into a pipe."""
    if sys.stderr.isatty() and not (job.printing.is_text or job.printing.quiet):
        note(f"{job.command}: " + "; ".join(f"{label} {value}" for label, value in costs))


@dataclass(frozen=True)
class Told:
    """What is told of a stage: the options that were given, and what it did, for reading."""

    options: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Row] = ()


def size_rows(result: Mapping[str, Any]) -> list[Row]:
    """Return the row that tells the bytes of an output, of its input, and their ratio."""
    before, after = result["bytes_before"], result["bytes"]
    return [("bytes", f"{before:,} -> {after:,} ({human_bytes(after)}, {result['ratio']:.3f} of the input)")]
