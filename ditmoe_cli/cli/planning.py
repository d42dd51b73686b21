"""The way that all commands take that write checkpoints: choose a plan, then preview it or write its result."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from ditmoe_cli.cli.calibration_options import AutomaticProfile
from ditmoe_cli.cli.costs import error_rows, facts, plan_rows
from ditmoe_cli.cli.foretelling import estimate_of, estimate_row, foretell
from ditmoe_cli.cli.groups import refuse_idle
from ditmoe_cli.cli.options import Destination, Measuring, Source, checked_device, dtype_on
from ditmoe_cli.cli.reuse import last_step, made_before, measured_errors, plan_of
from ditmoe_cli.cli.stage import Stage, open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit, human_bytes, note
from ditmoe_cli.compression.apply import applying_key, carry_out, check_values, loop_name
from ditmoe_cli.compression.estimates import carrying_out, profiling_estimate
from ditmoe_cli.compression.kept_plan import keep_plan, kept_plan
from ditmoe_cli.compression.methods import METHODS
from ditmoe_cli.compression.output import PlannedOutput, planned_output
from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.compression.planner import Planner, Work, request_digest
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.staging import check_space, check_target, clean_leftovers
from ditmoe_cli.files.workfolder import WorkFolder, discard_work, open_work, work_key
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import UNREAD, Checkpoint
from ditmoe_cli.model.effort import Estimate
from ditmoe_cli.model.throughput import known_rate, likely_device
from ditmoe_cli.routing.calibrate import made_profile
from ditmoe_cli.routing.profile import RoutingProfile, read_profile, require_profile_of
from ditmoe_cli.routing.profile_search import Basis, ProfileRequest, search


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
    if plan_only:
        output = replace(output, force=True)  # what stands there stays
    if not to.dry_run and not planner.measures:
        checkpoint = _claimed(planner, planning.profile_for(stage), checkpoint, output)
    job = Job(planner.command, stage, checkpoint, output, printing)
    work = Work(checkpoint, output, lambda: checked_device(planning.device), note)
    wanted = replace(
        automatic.request(stage, checkpoint, planning, output.path.parent),
        dtype=dtype_on(planning.dtype, planning.device, measures=not to.dry_run),
    )
    work, basis = prepared(planner, work, wanted)
    if plan_only:
        with chosen(planner, work, basis) as choice:
            return show_plan(job, choice, planning.device)
    made = made_before(output, checkpoint, _request(planner, work, basis, basis.profile if basis else None))
    if made is not None:
        plan = plan_of(made, checkpoint)
        details = planner.details(checkpoint, plan)
        return reuse(job, made, basis.path if basis else None, plan, details, dry_run=to.dry_run)
    if to.dry_run:
        return preview(job, foreseen(planner, work, basis), planning.device, choosing(planner, work, basis))
    with chosen(planner, work, basis) as choice:
        details = planner.details(checkpoint, choice.plan)
        judged = dict[str, Any]()
        write(job, choice, work.device, details, partial(_judge, planner, work, choice, judged))
        return _close(planner, judged)


def _judge(planner: Planner, work: Work, choice: Choice, judged: dict[str, Any], written: Path) -> Mapping[str, Any]:
    """Add what a planner measures of its written result to `judged`, and return that."""
    if choice.profile is not None:
        judged |= planner.judged(work, choice.profile, choice.plan, written)
    return judged


def _close(planner: Planner, judged: Mapping[str, Any]) -> None:
    """Say what there is to say of what was measured."""
    closing = planner.closing(judged)
    if closing is not None:
        note(closing)


def unread(checkpoint: Checkpoint, output: Output, claimed: str = UNREAD) -> Checkpoint:
    """Return a checkpoint whose fingerprint is as claimed until writing the output has read its weights.

    It is as it was where something stands at the output, which may be up to date, and where the metadata of the file
    says otherwise than what is claimed: then reading it tells before anything is written.
    """
    doubtful = claimed != UNREAD and checkpoint.written_fingerprint not in (None, claimed)
    stands = output.path.exists() and not output.force
    return checkpoint if doubtful or stands else replace(checkpoint, claimed=claimed)


def _claimed(planner: Planner, given: Path | None, checkpoint: Checkpoint, output: Output) -> Checkpoint:
    """Return a checkpoint to plan for before it is read, as far as a planner needs no other profile than a `given` one.

    Its fingerprint is what the profile says, unless that is plainly another's.
    """
    if not planner.needs_profile:
        return unread(checkpoint, output)
    profile = read_profile(given) if given is not None else None
    fits = profile is not None and tuple(profile.experts) == tuple(checkpoint.config.experts)
    if profile is None or not fits or profile.checkpoint in checkpoint.ancestors:
        return checkpoint
    return unread(checkpoint, output, profile.checkpoint)


def prepared(planner: Planner, work: Work, wanted: ProfileRequest) -> tuple[Work, Basis | None]:
    """Return the work with its calibration, and the profile to plan with or the way to make it; None without need.

    What cannot be done is refused here, before the first expensive step.
    """
    if not planner.needs_profile:
        wanted.refuse_settings(f"{planner.command} as asked for")
        planner.check(work)
        return work, None
    found = cache(lambda: search(work.checkpoint, wanted, note))
    work = replace(work, calibration=lambda: found().settings)
    planner.check(work)
    return work, found()


def foreseen(planner: Planner, work: Work, basis: Basis | None) -> CompressionPlan:
    """Return the plan of a dry run, which never profiles: without a profile it is undecided."""
    usable = basis.profile if basis is not None else None
    request = _request(planner, work, basis, usable)
    if basis is None:
        return replace(planner.plan(work, None), request=request)
    foretell(choosing(planner, work, basis) if usable else [], work.device)
    plan = planner.plan(work, usable) if usable else planner.undecided(work.checkpoint)
    return replace(plan, calibration=basis.settings, request=request)


def _request(planner: Planner, work: Work, basis: Basis | None, profile: RoutingProfile | None) -> str:
    """Return the digest of a request, with that of the profile as far as there is one."""
    settings = basis.settings if basis is not None else None
    return request_digest(planner, work.checkpoint.fingerprint, settings, profile.digest if profile else None)


@dataclass(frozen=True)
class Choice:
    """A plan, the profile that it rests on, and the work folder that already keeps it.

    `asked` returns the digest of the request for a checkpoint of a given fingerprint, where that is yet to be read.
    """

    plan: CompressionPlan
    profile: RoutingProfile | None = None
    work: WorkFolder | None = None
    asked: Callable[[str], str] | None = None

    def is_carried_out(self, depth: int) -> bool:
        """Return whether the work folder holds the weights of all blocks already: choosing the plan has tried it."""
        return self.work is not None and self.work.has_steps(loop_name(self.plan), depth)

    def of(self, checkpoint: Checkpoint) -> CompressionPlan:
        """Return the plan for the checkpoint as it turned out to be. Raises `BadInputError` for one of another."""
        if self.profile is not None:
            require_profile_of(self.profile, checkpoint.fingerprint, checkpoint.path)
        if self.asked is None or self.plan.source != UNREAD:
            return self.plan
        return replace(self.plan, source=checkpoint.fingerprint, request=self.asked(checkpoint.fingerprint))


@contextmanager
def chosen(planner: Planner, work: Work, basis: Basis | None) -> Iterator[Choice]:
    """Yield the plan of a request, profiling the checkpoint where that is needed.

    The plan is kept in the work folder, with what carrying it out keeps there, until the block ends.
    """
    target, force = work.output.path, work.output.force
    beside = [part.path for part in (basis.profile, basis.data) if part is not None] if basis is not None else []
    check_target(target, force, [work.checkpoint.path, *beside])
    if basis is None:
        asked = partial(request_digest, planner, calibration=None, profile=None)
        yield Choice(replace(planner.plan(work, None), request=asked(work.checkpoint.fingerprint)), asked=asked)
        return
    if basis.profile is None:
        known = _known_before(planner, work)
        size = planned_output(work.checkpoint, known).predicted_bytes(work.output) if known else None
        check_space(target, planner.least_bytes(work) if size is None else size)
        if known is not None:
            check_values(work.checkpoint, known)
    foretell(choosing(planner, work, basis), work.device)
    profile = made_profile(work.checkpoint, basis, work.device, note)
    request = _request(planner, work, basis, profile)
    for warning in planner.warnings(profile):
        note(f"warning: {warning}")
    if not planner.measures:  # writing keeps what there is to keep
        yield Choice(replace(planner.plan(work, profile), calibration=profile.calibration, request=request), profile)
        return
    device = work.device().partition(":")[0]
    with open_work(target, work_key({"request": request, "profile": profile.digest, "device": device}), note) as folder:
        plan = kept_plan(folder)
        if plan is None:
            plan = replace(planner.plan(replace(work, folder=folder), profile), calibration=profile.calibration)
            keep_plan(folder, plan, loop_name(plan) if plan.together else "")
        yield Choice(replace(plan, request=request), profile, folder)


def _known_before(planner: Planner, work: Work) -> CompressionPlan | None:
    """Return the plan as far as it is known without a profile, of the right size; None where that rests on one."""
    try:
        return planner.undecided(work.checkpoint)
    except BadInputError:
        return None


def choosing(planner: Planner, work: Work, basis: Basis | None) -> list[Estimate]:
    """Return what making the profile and the plan takes, as far as they are to be made."""
    if basis is None:
        return []
    made = [profiling_estimate(work.checkpoint.config, basis.calibration)] if basis.calibration is not None else []
    return [*made, *planner.estimates(work, float(basis.settings["cfg"]))]


def preview(job: Job, plan: CompressionPlan | None, device: str = "cpu", before: Sequence[Estimate] = ()) -> None:
    """Print a plan (None: a plain copy), the exact bytes that carrying it out would write, and what it would take.

    `before` is what choosing the plan takes. Writes nothing, and refuses what writing would. An undecided plan has the
    right size only, and is not printed.
    """
    output = job.output
    check_target(output.path, output.force, [job.checkpoint.path])
    result, rows = _foreseen_result(job, plan, device, before)
    rows = [("would write", output.path), *rows]
    emit(job.printing, job.stage.to_json({**result, "dry_run": True}), rows, str(output.path), editable=True)


def show_plan(job: Job, choice: Choice, device: str = "cpu") -> None:
    """Print a plan that was chosen, as a dry run does; what the pipe goes on with is the checkpoint as it is."""
    result, rows = _foreseen_result(job, choice.plan, device)
    stage = job.stage if choice.profile is None else replace(job.stage, profile=str(choice.profile.path.absolute()))
    emit(job.printing, stage.to_json({**result, "plan_only": True}), rows, None, editable=True)


def _foreseen_result(
    job: Job, plan: CompressionPlan | None, device: str, before: Sequence[Estimate] = ()
) -> tuple[dict[str, Any], list[Row]]:
    """Return bytes, estimate and plan as JSON and as rows, without what is undecided."""
    size = planned_output(job.checkpoint, plan).predicted_bytes(job.output)
    result = size_facts(job.checkpoint, size)
    estimates, rate = [*before, *carrying_out(job.checkpoint, plan, size)], known_rate(likely_device(device))
    result["estimate"] = estimate_of(estimates, rate)
    result["plan"] = plan.document() if plan is not None and plan.decided else None
    told = plan_rows(plan, job.checkpoint) + error_rows(plan.options) if plan is not None and plan.decided else []
    return result, [*told, *size_rows(result), estimate_row(estimates, rate)]


def write(
    job: Job,
    choice: Choice | None,
    device: Callable[[], str] = lambda: "cpu",
    details: Mapping[str, Any] | None = None,
    judged: Callable[[Path], Mapping[str, Any]] = lambda _: {},
) -> None:
    """Carry a plan out (None: a plain copy) and print the result. `device` is asked for where weights are computed.

    `judged` returns what is measured of the written result.
    """
    computes = choice is not None and choice.plan.computes
    place = device() if computes else "cpu"
    check_target(job.output.path, job.output.force, [job.checkpoint.path])
    if choice is not None and computes:  # for minutes: what it rests on is checked before
        job = replace(job, checkpoint=job.checkpoint.settled())
        choice = replace(choice, plan=choice.of(job.checkpoint))
    plan, profile = (choice.plan, choice.profile) if choice else (None, None)
    planned = planned_output(job.checkpoint, plan)
    check_space(job.output.path, planned.needed_bytes(job.output))
    estimates = carrying_out(job.checkpoint, plan, planned.predicted_bytes(job.output))
    is_tried = choice is not None and choice.is_carried_out(job.checkpoint.config.depth)
    foretell(estimates[1:] if is_tried else estimates, lambda: place)
    with _work_folder(job, choice, place) as work:
        settled = _settling(job.checkpoint, choice)
        applied = carry_out(job.checkpoint, planned, job.output, profile, place, work, settled)
    _warn_of_changes(job.checkpoint)
    plan = applied.planned.plan
    sizes, known = size_facts(job.checkpoint, applied.bytes), facts(plan, job.checkpoint) if plan is not None else {}
    digest = plan.digest if plan else None
    measured = {**applied.measured.to_json(), **judged(job.output.path)}
    seconds = round(time.monotonic() - job.started, 1)
    result = {**sizes, **known, **(details or {}), "plan_digest": digest, **measured, "seconds": seconds}
    options = plan.options if plan else {}
    paths = {"profile": profile.path} if profile else {}
    stage = job.stage.done(job.command, options, checkpoint=job.output.path, samples=None, **paths)
    costs = [*error_rows(result), *size_rows(result), ("seconds", f"{seconds:,.1f}")]
    rows = [("wrote", job.output.path), *(plan_rows(plan, job.checkpoint) if plan else []), *costs]
    emit(job.printing, stage.to_json(result), rows, str(job.output.path))
    if sys.stderr.isatty() and not (job.printing.is_text or job.printing.quiet):  # as in a pipe on a terminal
        note(f"{job.command}: " + "; ".join(f"{label} {value}" for label, value in costs))


def _warn_of_changes(checkpoint: Checkpoint) -> None:
    """Say on stderr that tensors of the input, which was hashed while it was read, are not what ditmoe wrote."""
    if checkpoint.changed:
        first, *others = checkpoint.changed
        which = f"tensor {first!r}{f' and {len(others)} more' if others else ''}"
        verb = "are" if others else "is"
        note(
            f"warning: {checkpoint.path}: {which} {verb} not what ditmoe wrote, and the output is made from it; "
            "ditmoe inspect --verify tells more"
        )


def _settling(checkpoint: Checkpoint, choice: Choice | None) -> Callable[[], PlannedOutput] | None:
    """Return what lays the output out when the checkpoint was read; None where its fingerprint is known."""
    if (checkpoint.original or checkpoint).claimed is None:
        return None

    @cache
    def settled() -> PlannedOutput:
        read = checkpoint.settled()
        return planned_output(read, None if choice is None else choice.of(read))

    return settled


@dataclass(frozen=True)
class Told:
    """What is told of a stage: the options that were given, and what it did, for reading."""

    options: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Row] = ()


def reuse(
    job: Job,
    made: Checkpoint,
    profile: Path | None = None,
    plan: CompressionPlan | None = None,
    details: Mapping[str, Any] | None = None,
    *,
    told: Told | None = None,
    dry_run: bool = False,
) -> None:
    """Print the result of a stage that was run before, whose output is up to date, as far as the output tells it.

    Options and rows are those of the plan, or what is `told` without one. A dry run says the same; what an interrupted
    run left beside the output then stays.
    """
    path = job.output.path
    note(f"{path} is up to date")
    if not dry_run:
        clean_leftovers(path)
        discard_work(path)
    step = last_step(made) if plan is not None else None
    errors = measured_errors(step) if step else {}
    known = {**(facts(plan, job.checkpoint) if plan else {}), **(details or {}), **errors}
    size = path.stat().st_size if job.output.is_file else sum(child.stat().st_size for child in path.iterdir())
    result = {
        **size_facts(job.checkpoint, size),
        **known,
        "plan_digest": step.plan if step else None,
        "up_to_date": True,
        **({"dry_run": True} if dry_run else {}),
    }
    paths = {"profile": profile} if profile is not None and profile.is_file() else {}
    told = told or (Told(plan.options, plan_rows(plan, job.checkpoint)) if plan else Told())
    stage = job.stage.done(job.command, told.options, checkpoint=path, samples=None, **paths)
    rows = [("up to date", path), *told.rows, *size_rows(result)]
    emit(job.printing, stage.to_json(result), rows, str(path))


def _work_folder(job: Job, choice: Choice | None, device: str) -> AbstractContextManager[WorkFolder | None]:
    """Return the work folder of a plan that computes weights; None for any other."""
    if choice is None or choice.profile is None or not choice.plan.computes:
        return nullcontext()
    if choice.work is not None:
        return nullcontext(choice.work)
    return open_work(job.output.path, applying_key(choice.plan, choice.profile, device), note)


def size_facts(checkpoint: Checkpoint, size: int) -> dict[str, Any]:
    """Return the bytes of an output, of its input, and their ratio."""
    before = checkpoint.header.file_bytes
    return {"bytes": size, "bytes_before": before, "ratio": size / before}


def size_rows(result: Mapping[str, Any]) -> list[Row]:
    """Return the row that tells them."""
    before, after = result["bytes_before"], result["bytes"]
    return [("bytes", f"{before:,} -> {after:,} ({human_bytes(after)}, {result['ratio']:.3f} of the input)")]
