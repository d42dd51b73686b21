"""Schedules of compute of a checkpoint: checked, foretold, chosen, and written."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_cli.api.devices import checked_device
from ditmoe_cli.api.foretelling import estimate_of, foretell
from ditmoe_cli.api.guiding_requests import Guiding
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.output_names import FileDestination
from ditmoe_cli.api.sampling_requests import SamplingOptions, guided_in
from ditmoe_cli.briefs import Brief, Fact
from ditmoe_cli.diffusion.compute_schedule import ScheduledSampling, read_schedule, schedule_document
from ditmoe_cli.diffusion.few_steps import told_sampling
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.diffusion.schedule import DEFAULT_SOLVER, Solver
from ditmoe_cli.diffusion.step_bins import choose_bins
from ditmoe_cli.errors import BadInputError, InfeasibleError, UsageError
from ditmoe_cli.files.fingerprint import canonical_json
from ditmoe_cli.files.staging import check_target
from ditmoe_cli.model.block_choices import ComputeTable
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dtypes import Dtype
from ditmoe_cli.model.effort import Estimate
from ditmoe_cli.model.throughput import Rate, known_rate, likely_device
from ditmoe_cli.routing.profile import RoutingProfile, read_profile, require_profile_of
from ditmoe_cli.scheduling.fewer_steps import FewerSteps
from ditmoe_cli.scheduling.profiled_energies import check_profiled, takes_energies
from ditmoe_cli.scheduling.schedule_request import Asked, check_asked, schedule_estimate, usual_bins
from ditmoe_cli.scheduling.whole_methods import PLANNED
from ditmoe_cli.version import __version__

if TYPE_CHECKING:
    from ditmoe_cli.scheduling.chosen_schedule import Chosen, Tried
    from ditmoe_cli.scheduling.way_states import Way


@dataclass(frozen=True)
class WaySampling(SamplingOptions):
    """The way of sampling that a schedule is for, and the images that it is chosen on."""

    images: int = 32

    def spec(
        self, checkpoint: Checkpoint, solvers: Mapping[Sampler, Solver] = DEFAULT_SOLVER, dtype: Dtype = "fp32"
    ) -> SampleSpec:
        """Return the spec that the options ask for. Raises `UsageError` for an interval without guidance."""
        return guided_in(self.interval, super().spec(checkpoint, solvers, dtype))


@dataclass(frozen=True)
class Scheduling:
    """How a schedule is chosen, and within what."""

    flops: float | None = None
    max_damage: float | None = None
    method: str = PLANNED
    bins: int | None = None
    profile: Path | None = None
    anyway: bool = False
    device: str = "auto"

    def profiled(self, checkpoint: Checkpoint, asked: Asked, way: ScheduledSampling) -> RoutingProfile | None:
        """Return the profile whose norms of outputs are taken, if one is given.

        Raises `UsageError` where the method takes none, and `BadInputError` for one of another checkpoint, and as
        `check_profiled` does.
        """
        if self.profile is None:
            return None
        if not takes_energies(asked.method):
            raise UsageError(f"⟨profile⟩: has no effect beside ⟨method⟩ {asked.method}; leave one out")
        profile = require_profile_of(read_profile(self.profile), checkpoint.fingerprint, checkpoint.path)
        return check_profiled(profile, checkpoint.config, bool(way.null))

    def asked(self, spec: SampleSpec) -> Asked:
        """Return what is asked of a schedule for a way of sampling. Raises `UsageError` for a number of bins."""
        evaluations = len(spec.way.times)
        bins = choose_bins(usual_bins(evaluations) if self.bins is None else self.bins, evaluations)
        return Asked(self.method, self.flops, self.max_damage, spec.images, bins)


@dataclass(frozen=True, repr=False)
class MadeSchedule(Brief):
    """A schedule in a file.

    Attributes:
        path: the file.
        bytes: its size.
        method: how it was chosen: ``planned``, or a method for the whole model.
        sampling: the way of sampling that it is for.
        shares: the share of all cells (evaluation, branch, block) that each choice has, most frequent first.
        measured: operations, damage and what else was measured while it was chosen.
    """

    path: Path
    bytes: int
    method: str
    sampling: ScheduledSampling
    shares: Mapping[str, float]
    measured: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        told = {"bytes": self.bytes, "method": self.method, "sampling": self.sampling.to_json()}
        return {**told, "choices": dict(self.shares), **self.measured}

    def _brief(self) -> list[Fact]:
        return [
            ("", self.path),
            ("method", self.method),
            ("for", self.sampling.told),
            ("operations", f"{self.measured['flops']:.3f} of all"),
            ("damage", f"{self.measured['damage']:.3g}, at most {self.measured['damage_bound']:.3g}"),
        ]


@dataclass(frozen=True)
class ForeseenSchedule:
    """What choosing a schedule would take."""

    path: Path
    method: str
    sampling: ScheduledSampling
    estimate: Estimate
    rate: Rate

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        told = {"path": str(self.path.absolute()), "method": self.method, "sampling": self.sampling.to_json()}
        return {**told, "dry_run": True, "estimate": estimate_of([self.estimate], self.rate)}


def scheduled_result(
    checkpoint: Checkpoint,
    sampling: SamplingOptions,
    guiding: Guiding,
    scheduling: Scheduling,
    to: FileDestination,
    dry_run: bool = False,
) -> MadeSchedule | ForeseenSchedule:
    """Choose a schedule and write it; return that of an earlier run where the same was asked.

    Raises `InfeasibleError` where fewer steps are nearer to the fine solution at the same cost, unless it is asked for
    `anyway`, and as `chosen_schedule` does.
    """
    untimed = _untimed(checkpoint, sampling, guiding)
    asked, way = check_asked(scheduling.asked(untimed), checkpoint.config, untimed.way), untimed.way
    profile = scheduling.profiled(checkpoint, asked, way)
    target = to.at(checkpoint.path, f"{_named(asked)}.{_named_way(way)}.schedule").absolute()
    estimate = schedule_estimate(asked, checkpoint.config, way)
    if dry_run:
        return ForeseenSchedule(target, asked.method, way, estimate, known_rate(likely_device(scheduling.device)))
    device = checked_device(scheduling.device)
    spec = guiding.over(sampling.on(device))(checkpoint)
    request = _request(checkpoint, spec, asked, profile)
    made = None if to.force else _made_before(target, request)
    if made is not None:
        _check_rival(made.measured, scheduling.anyway)
        note(f"{target.name}: is up to date")
        return made
    check_target(target, to.force, (checkpoint.path,))
    foretell([estimate], lambda: device)
    loaded = _way(checkpoint, spec, guiding, scheduling.device)
    return _chosen(checkpoint, spec, loaded, asked, profile, scheduling.anyway, target, to.force, request)


def _untimed(checkpoint: Checkpoint, sampling: SamplingOptions, guiding: Guiding) -> SampleSpec:
    """Return the spec without the dtype that ``auto`` would measure."""
    guiding.check(checkpoint)
    spec = sampling.spec(checkpoint)
    return replace(spec, guide=guiding.used)


def _named(asked: Asked) -> str:
    """Return the method, and what it was to keep to, as part of a name."""
    within = f"{asked.flops:g}" if asked.flops is not None else f"damage{asked.max_damage:g}" if asked.plans else ""
    return asked.method.replace(":", "") + within


def _named_way(way: ScheduledSampling) -> str:
    """Return the way of sampling as part of a name."""
    return f"{way.solver}{way.steps}" + (f"-cfg{way.cfg:g}" if way.cfg != 1.0 else "")


def _request(checkpoint: Checkpoint, spec: SampleSpec, asked: Asked, profile: RoutingProfile | None) -> str:
    """Return the digest of all that determines a schedule."""
    wanted = {"asked": asdict(asked), "spec": spec.to_json(), "checkpoint": checkpoint.fingerprint}
    wanted |= {} if profile is None else {"profile": profile.digest}
    return hashlib.sha256(canonical_json({**wanted, "version": __version__}).encode()).hexdigest()


def _made_before(target: Path, request: str) -> MadeSchedule | None:
    """Return the schedule of an earlier run that was asked for the same; None where something else stands there."""
    if not target.is_file():
        return None
    try:
        found = read_schedule(target)
    except BadInputError:
        return None
    if found.measured.get("request") != request:
        return None
    return _made(target, found.method, found.sampling, found.table, found.measured)


def _made(
    path: Path, method: str, sampling: ScheduledSampling, table: ComputeTable, measured: Mapping[str, Any]
) -> MadeSchedule:
    told = {name: value for name, value in measured.items() if name != "request"}
    return MadeSchedule(path, path.stat().st_size, method, sampling, _shares(table), told)


def _shares(table: ComputeTable) -> dict[str, float]:
    """Return the share of all cells that each kind of choice has; thresholds are left out."""
    kinds = Counter(
        "null class not predicted" if branch == 1 and not table.computes_null(evaluation) else _kind(table, index)
        for evaluation, step in enumerate(table.cells)
        for branch, blocks in enumerate(step)
        for index in blocks
    )
    return {kind: count / kinds.total() for kind, count in kinds.most_common()}


def _kind(table: ComputeTable, index: int) -> str:
    return "+".join(part.partition(":")[0] for part in table.choices[index].text.split("+"))


def _chosen(
    checkpoint: Checkpoint,
    spec: SampleSpec,
    way: Way,
    asked: Asked,
    profile: RoutingProfile | None,
    anyway: bool,
    target: Path,
    force: bool,
    request: str,
) -> MadeSchedule:
    from ditmoe_cli.files.arrays import write_arrays
    from ditmoe_cli.scheduling.chosen_schedule import chosen_schedule, fewer_steps_than
    from ditmoe_cli.scheduling.profiled_energies import profiled_energies

    chosen = chosen_schedule(way, asked, None if profile is None else profiled_energies(profile, asked.bins))
    fewer = None if checkpoint.distilled is not None else fewer_steps_than(chosen, way)
    measured = {**_measured(chosen, spec, fewer), "request": request}
    _check_rival(measured, anyway)
    method = asked.method if chosen.best.name in (asked.method, "full") else f"{asked.method} ({chosen.best.name})"
    table = chosen.best.table
    document = schedule_document(checkpoint.fingerprint, spec.way, method, table, asked.bins, measured)
    arrays = {name: array.cpu().numpy() for name, array in chosen.arrays.items()}
    write_arrays(target, arrays, document, force, (checkpoint.path,))
    return _made(target, method, spec.way, table, measured)


def _way(checkpoint: Checkpoint, spec: SampleSpec, guiding: Guiding, device: str) -> Way:
    """Return the model in memory with the way in which it is sampled."""
    import torch

    from ditmoe_cli.diffusion.weak_models import weak_model
    from ditmoe_cli.formats.unpacked_weights import unpacked_weights
    from ditmoe_cli.model.dtypes import torch_dtype_of
    from ditmoe_cli.model.loading import build_model
    from ditmoe_cli.scheduling.way_states import Way

    place, dtype, unpacked = torch.device(checked_device(device)), torch_dtype_of(spec.dtype), unpacked_weights()

    def load(source: Checkpoint | None) -> Any:
        assert source is not None
        return build_model(source, place, dtype, unpacked).prepack()

    model = load(checkpoint)
    return Way(model, spec.way, spec.seed, spec.classes, weak_model(model, spec.guide, lambda: load(guiding.weak)))


def _measured(chosen: Chosen, spec: SampleSpec, fewer: FewerSteps | None) -> dict[str, Any]:
    """Return what was measured, as JSON."""
    best = chosen.best
    return {
        **_facts(best),
        "damage_bound": best.bound,
        "predicted": best.predicted,
        "gap": best.gap,
        "kept_bytes": round(best.kept),
        "images": spec.images,
        "seed": spec.seed,
        "dtype": spec.dtype,
        "tried": [{"name": each.name, **_facts(each)} for each in chosen.others],
        "fewer_steps": None if fewer is None else _rival_facts(fewer),
    }


def _facts(tried: Tried) -> dict[str, float]:
    return {"flops": tried.flops, "damage": tried.damage}


def _rival_facts(fewer: FewerSteps) -> dict[str, Any]:
    return {
        "solver": fewer.sampling.solver,
        "steps": fewer.sampling.steps,
        "evaluations": fewer.evaluations,
        "error": fewer.error,
        "schedule_error": fewer.schedule,
        "full_error": fewer.full,
    }


def _check_rival(measured: Mapping[str, Any], anyway: bool) -> None:
    """Raise `InfeasibleError`, which says what to do, where fewer steps win and that is not accepted."""
    rival = measured["fewer_steps"]
    if anyway or rival is None or rival["error"] > rival["schedule_error"]:
        return
    times = rival["schedule_error"] / max(rival["error"], 1e-30)
    steps = told_sampling(rival["solver"], rival["steps"])
    raise InfeasibleError(
        f"{steps} cost no more ({rival['evaluations']} evaluations, the schedule "
        f"{measured['flops']:.2f} of all operations) and err {times:.1f} times less, {rival['error']:.2g} against "
        f"{rival['schedule_error']:.2g} of the fine solution; sample so, or write the schedule with ⟨anyway⟩"
    )
