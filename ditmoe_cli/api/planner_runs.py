"""From a planner to its plan and its result: check, find or make the profile, plan, write. One way for all planners."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from ditmoe_cli.api.devices import checked_device
from ditmoe_cli.api.earlier_results import last_step, made_before, measured_errors, plan_of, require_clock
from ditmoe_cli.api.foretelling import foretell
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.plan_facts import facts
from ditmoe_cli.api.written_checkpoints import ForeseenCheckpoint, WrittenCheckpoint
from ditmoe_cli.compression.apply import applying_key, carry_out, check_values, loop_name
from ditmoe_cli.compression.estimates import carrying_out, profiling_estimate
from ditmoe_cli.compression.kept_plan import keep_plan, kept_plan
from ditmoe_cli.compression.output import PlannedOutput, planned_output
from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.compression.planner import Planner, Work, request_digest
from ditmoe_cli.compression.recorded import GIVEN_CLOCK
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.arrays import disk_bytes
from ditmoe_cli.files.staging import check_space, check_target, clean_leftovers, require_place
from ditmoe_cli.files.workfolder import WorkFolder, discard_work, open_work, work_key
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import UNREAD, Checkpoint
from ditmoe_cli.model.effort import Estimate
from ditmoe_cli.model.throughput import known_rate, likely_device
from ditmoe_cli.routing.calibrate import made_profile
from ditmoe_cli.routing.profile import RoutingProfile, read_profile, require_profile_of
from ditmoe_cli.routing.profile_search import Basis, ProfileRequest, search


@dataclass(frozen=True)
class PlannerRun:
    """What a planner works on: the checkpoint, where its result goes, the profile that it takes, and the device."""

    planner: Planner
    checkpoint: Checkpoint
    output: Output
    wanted: ProfileRequest
    device: str = "auto"

    @property
    def work(self) -> Work:
        """The same as planners take it."""
        return Work(self.checkpoint, self.output, lambda: checked_device(self.device), note)


@contextmanager
def chosen_alone(run: PlannerRun) -> Iterator[Choice]:
    """Yield the plan of a request that is not carried out; what stands at the output's place stays."""
    run = replace(run, output=replace(run.output, force=True))
    work, basis = prepared(run.planner, run.work, run.wanted)
    with chosen(run.planner, work, basis, alone=True) as choice:
        yield choice


def foreseen_result(run: PlannerRun) -> ForeseenCheckpoint | WrittenCheckpoint:
    """Return what a planner would write, without writing anything; what stands there already if it is up to date."""
    work, basis = prepared(run.planner, run.work, run.wanted)
    return _made(run, work, basis, dry_run=True) or _foreseen(run, work, basis)


def foreseen_alone(run: PlannerRun) -> ForeseenCheckpoint:
    """Return what a planner would write, whether or not that stands there already."""
    return _foreseen(run, *prepared(run.planner, run.work, run.wanted))


def _foreseen(run: PlannerRun, work: Work, basis: Basis | None) -> ForeseenCheckpoint:
    plan = foreseen(run.planner, work, basis)
    return foresee(run.checkpoint, run.output, plan, run.device, choosing(run.planner, work, basis))


def planned_result(run: PlannerRun) -> WrittenCheckpoint:
    """Plan, and carry the plan out, unless the same request has been carried out before."""
    planner, started = run.planner, time.monotonic()
    if not planner.measures:
        run = replace(run, checkpoint=_claimed(planner, run.wanted.given, run.checkpoint, run.output))
    work, basis = prepared(planner, run.work, run.wanted)
    made = _made(run, work, basis, dry_run=False)
    if made is not None:
        return made
    with chosen(planner, work, basis) as choice:
        details = planner.details(run.checkpoint, choice.plan)
        judged = partial(_judge, planner, work, choice)
        result = write(run.checkpoint, run.output, choice, work.device, details, judged)
    return replace(result, seconds=round(time.monotonic() - started, 1))


def _judge(planner: Planner, work: Work, choice: Choice, written: Path) -> Mapping[str, Any]:
    """Return what a planner measures of its written result."""
    return planner.judged(work, choice.profile, choice.plan, written) if choice.profile is not None else {}


def _made(run: PlannerRun, work: Work, basis: Basis | None, *, dry_run: bool) -> WrittenCheckpoint | None:
    """Return the result where the same request has been carried out before."""
    request = _request(run.planner, work, basis, basis.profile if basis else None)
    made = made_before(run.output, run.checkpoint, request)
    if made is None:
        return None
    require_clock(made, run.planner.clock)
    plan = plan_of(made, run.checkpoint)
    details = run.planner.details(run.checkpoint, plan)
    profile = basis.path if basis else None
    return found_again(run.checkpoint, run.output, made, profile, plan, details, dry_run=dry_run)


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
    `clock` is what an earlier run chose for its training by the clock, where that is given.
    """

    plan: CompressionPlan
    profile: RoutingProfile | None = None
    work: WorkFolder | None = None
    asked: Callable[[str], str] | None = None
    clock: tuple[int, ...] | None = None

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
def chosen(planner: Planner, work: Work, basis: Basis | None, *, alone: bool = False) -> Iterator[Choice]:
    """Yield the plan of a request, profiling the checkpoint where that is needed.

    The plan is kept in the work folder, with what carrying it out keeps there, until the block ends. One that is chosen
    `alone` needs no place for its result, unless it is measured or profiled for.
    """
    target, force = work.output.path, work.output.force
    beside = [part.path for part in (basis.profile, basis.data) if part is not None] if basis is not None else []
    if not alone:
        check_target(target, force, [work.checkpoint.path, *beside])
    elif basis is not None and (basis.profile is None or planner.measures):
        require_place(target.parent, "what a plan rests on")
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
        yield Choice(replace(plan, request=request), profile, folder, clock=planner.clock)


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


def foresee(
    checkpoint: Checkpoint,
    output: Output,
    plan: CompressionPlan | None,
    device: str = "cpu",
    before: Sequence[Estimate] = (),
) -> ForeseenCheckpoint:
    """Return what carrying a plan out (None: a plain copy) would write; `before` is what choosing the plan takes.

    Raises what writing would for an output that is in the way.
    """
    check_target(output.path, output.force, [checkpoint.path])
    return laid_out(checkpoint, output, plan, device, before)


def laid_out(
    checkpoint: Checkpoint,
    output: Output,
    plan: CompressionPlan | None,
    device: str = "cpu",
    before: Sequence[Estimate] = (),
) -> ForeseenCheckpoint:
    """Return the same, whatever stands in the output's place."""
    size = planned_output(checkpoint, plan).predicted_bytes(output)
    estimates = [*before, *carrying_out(checkpoint, plan, size)]
    rate = known_rate(likely_device(device))
    return ForeseenCheckpoint(output.path, size, checkpoint.header.file_bytes, plan, estimates, rate)


def write(
    checkpoint: Checkpoint,
    output: Output,
    choice: Choice | None,
    device: Callable[[], str] = lambda: "cpu",
    details: Mapping[str, Any] | None = None,
    judged: Callable[[Path], Mapping[str, Any]] = lambda _: {},
) -> WrittenCheckpoint:
    """Carry a plan out (None: a plain copy). `device` is asked for where weights are computed.

    `details` are told with the result, and `judged` returns what is measured of it once it is written.
    """
    started = time.monotonic()
    computes = choice is not None and choice.plan.computes
    place = device() if computes else "cpu"
    check_target(output.path, output.force, [checkpoint.path])
    if choice is not None and computes:  # for minutes: what it rests on is checked before
        checkpoint = checkpoint.settled()
        choice = replace(choice, plan=choice.of(checkpoint))
    plan, profile = (choice.plan, choice.profile) if choice else (None, None)
    planned = planned_output(checkpoint, plan)
    check_space(output.path, planned.needed_bytes(output))
    estimates = carrying_out(checkpoint, plan, planned.predicted_bytes(output))
    is_tried = choice is not None and choice.is_carried_out(checkpoint.config.depth)
    foretell(estimates[1:] if is_tried else estimates, lambda: place)
    with _work_folder(output, choice, place) as work:
        if choice is not None and choice.clock is not None and work is not None:
            work.write(GIVEN_CLOCK, {}, {"clock": list(choice.clock)})
        applied = carry_out(checkpoint, planned, output, profile, place, work, _settling(checkpoint, choice))
    _warn_of_changes(checkpoint)
    plan = applied.planned.plan
    known = facts(plan, checkpoint) if plan is not None else {}
    measured = {**applied.measured.to_json(), **judged(output.path)}
    return WrittenCheckpoint(
        path=output.path,
        bytes=applied.bytes,
        bytes_before=checkpoint.header.file_bytes,
        figures={**known, **(details or {}), **measured},
        plan=plan,
        plan_digest=plan.digest if plan else None,
        profile=profile.path if profile else None,
        seconds=round(time.monotonic() - started, 1),
    )


def _warn_of_changes(checkpoint: Checkpoint) -> None:
    """Say on stderr that tensors of the input, which was hashed while it was read, are not what ditmoe wrote."""
    if checkpoint.changed:
        first, *others = checkpoint.changed
        which = f"tensor {first!r}{f' and {len(others)} more' if others else ''}"
        verb = "are" if others else "is"
        note(
            f"warning: {checkpoint.path}: {which} {verb} not what ditmoe wrote, and the output is made from it; "
            "ditmoe inspect ⟨verify⟩ tells more"
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


def found_again(
    checkpoint: Checkpoint,
    output: Output,
    made: Checkpoint,
    profile: Path | None = None,
    plan: CompressionPlan | None = None,
    details: Mapping[str, Any] | None = None,
    *,
    dry_run: bool = False,
) -> WrittenCheckpoint:
    """Return the result of a stage that was run before, whose output `made` is up to date, as far as that tells it.

    What an interrupted run left beside the output stays in a dry run alone.
    """
    note(f"{output.path} is up to date")
    if not dry_run:
        clean_leftovers(output.path)
        discard_work(output.path)
    step = last_step(made) if plan is not None else None
    known = facts(plan, checkpoint) if plan else {}
    return WrittenCheckpoint(
        path=output.path,
        bytes=disk_bytes(output.path),
        bytes_before=checkpoint.header.file_bytes,
        figures={**known, **(details or {}), **(measured_errors(step) if step else {})},
        plan=plan,
        plan_digest=step.plan if step else None,
        profile=profile if profile is not None and profile.is_file() else None,
    )


def _work_folder(output: Output, choice: Choice | None, device: str) -> AbstractContextManager[WorkFolder | None]:
    """Return the work folder of a plan that computes weights; None for any other."""
    if choice is None or choice.profile is None or not choice.plan.computes:
        return nullcontext()
    if choice.work is not None:
        return nullcontext(choice.work)
    return open_work(output.path, applying_key(choice.plan, choice.profile, device), note)
