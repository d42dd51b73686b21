"""How images are to be sampled, and where."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ditmoe_cli.api.devices import checked_device, dtype_on
from ditmoe_cli.api.notes import note
from ditmoe_cli.compression.planner import label_of
from ditmoe_cli.diffusion.compute_schedule import ComputeSchedule, read_schedule
from ditmoe_cli.diffusion.few_steps import check_unguided, other_steps, told_steps, usual_sampling
from ditmoe_cli.diffusion.sampling import SampleSpec, check_spec
from ditmoe_cli.diffusion.schedule import ALWAYS, DEFAULT_SOLVER, SOLVERS, UPSTREAM, Interval, Solver, choose_solver
from ditmoe_cli.errors import UsageError
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dtypes import AUTO, Dtype
from ditmoe_cli.processes import first_process

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.worker import Runtime

_LONGEST = 24  # characters of a list of classes in a name


@dataclass(frozen=True)
class SamplingOptions:
    """What is asked of every sampling: of commands that follow a sampler step by step."""

    images: int = 64
    steps: int | None = None
    cfg: float = 1.0
    interval: Interval = ALWAYS
    solver: str | None = None
    upstream: bool = False
    classes: tuple[int, ...] | None = None
    seed: int = 0
    dtype: str = AUTO

    def on(
        self,
        device: str,
        solvers: Mapping[Sampler, Solver] = DEFAULT_SOLVER,
        schedule: ComputeSchedule | None = None,
        beside: Checkpoint | None = None,
    ) -> Callable[[Checkpoint], SampleSpec]:
        """Return what gives the spec for a checkpoint on a device; dtype ``auto`` is chosen for the first of them.

        It is fp32 where upstream is followed, which samples so. Of each distilled checkpoint it is said once by which
        steps it is sampled, and of one that has a schedule, which is sampled in the way of that (`as_planned`). So are
        others of the same steps that are sampled `beside` it.
        """
        dtype_of = dtype_on("fp32" if self.upstream and self.dtype == AUTO else self.dtype, device)
        told = set[Path]()

        def spec_of(checkpoint: Checkpoint) -> SampleSpec:
            planned = schedule is not None and (
                schedule.checkpoint == checkpoint.fingerprint
                or (beside is not None and beside.distilled == checkpoint.distilled)
            )
            asked = self.as_planned(schedule) if schedule is not None and planned else self
            spec = asked.spec(checkpoint, solvers, dtype_of(checkpoint))
            if checkpoint.path not in told:
                told.add(checkpoint.path)
                note_steps(checkpoint, spec)
                if asked != self and schedule is not None and schedule.is_for(spec.way) and first_process():
                    note(f"{checkpoint.name}: sampled as its schedule plans, by {spec.way.told}")
            return spec

        return spec_of

    def as_planned(self, schedule: ComputeSchedule) -> Self:
        """Return the options with solver, steps and guidance of a schedule in place of those that were not given."""
        way = schedule.sampling
        if self.upstream:
            return self
        return replace(
            self,
            solver=SOLVERS[way.solver].name if self.solver is None else self.solver,
            steps=way.steps if self.steps is None else self.steps,
            cfg=way.cfg if self.cfg == 1.0 else self.cfg,
            interval=way.interval if self.interval == ALWAYS else self.interval,
        )

    def spec(
        self, checkpoint: Checkpoint, solvers: Mapping[Sampler, Solver] = DEFAULT_SOLVER, dtype: Dtype = "fp32"
    ) -> SampleSpec:
        """Return the spec that the options ask for; `solvers` are those of each family where none is named.

        Those of a distilled checkpoint are its own. Raises `UsageError` for values out of range, and for guidance of a
        distilled checkpoint.
        """
        config, distilled = checkpoint.config, checkpoint.distilled
        if self.upstream and (self.solver is not None or self.steps is not None):
            raise UsageError("⟨upstream_exact⟩ names solver and steps; leave out ⟨solver⟩ and ⟨steps⟩")
        if self.upstream and distilled is not None:
            raise UsageError(
                f"⟨upstream_exact⟩: {checkpoint.name} was distilled to {told_steps(distilled)}, and its weights are "
                "right at these alone; leave it out"
            )
        check_unguided(checkpoint, self.cfg, None if self.interval == ALWAYS else self.interval)
        solver, steps = usual_sampling(checkpoint, solvers)
        if self.upstream:
            solver, steps = UPSTREAM[config.sampler]
        if self.solver is not None:
            solver = choose_solver(self.solver, config.sampler)
        spec = SampleSpec(
            images=self.images,
            steps=steps if self.steps is None else self.steps,
            cfg=self.cfg,
            seed=self.seed,
            solver=solver,
            classes=tuple(range(config.num_classes)) if self.classes is None else self.classes,
            interval=self.interval,
            dtype=dtype,
        )
        return check_spec(spec, config)


@dataclass(frozen=True)
class ImageSampling(SamplingOptions):
    """Sampling for the images alone: with every solver, guided where wished, and decoded."""

    vae: str | None = None

    def spec(
        self, checkpoint: Checkpoint, solvers: Mapping[Sampler, Solver] = DEFAULT_SOLVER, dtype: Dtype = "fp32"
    ) -> SampleSpec:
        """Return the spec that the options ask for. Raises `UsageError` for an interval without guidance."""
        return guided_in(self.interval, super().spec(checkpoint, solvers, dtype))


def guided_in(interval: Interval, spec: SampleSpec) -> SampleSpec:
    """Return a spec. Raises `UsageError` for an interval that was asked for where nothing is guided."""
    if interval != ALWAYS and spec.cfg == 1.0:
        low, high = interval
        raise UsageError(
            f"⟨cfg_interval⟩ {low:g},{high:g}: nothing is guided at a scale of 1; give a scale with ⟨cfg⟩, or leave "
            "it out"
        )
    return spec


@dataclass(frozen=True)
class Scheduling:
    """The schedule that says what blocks compute, if any."""

    schedule: Path | None = None

    def opened(self) -> ComputeSchedule | None:
        """Return the schedule; None without any. Raises `BadInputError` as `read_schedule` does."""
        return None if self.schedule is None else read_schedule(self.schedule.absolute())


def note_steps(checkpoint: Checkpoint, spec: SampleSpec) -> None:
    """Say by which steps a distilled checkpoint is sampled, and what other steps than its own cost."""
    distilled = checkpoint.distilled
    if distilled is None or not first_process():
        return
    warning = other_steps(checkpoint, spec.solver, spec.steps)
    note(warning or f"{checkpoint.name}: distilled to {told_steps(distilled)}; sampling so")


def samples_label(spec: SampleSpec, options: ImageSampling, checkpoint: Checkpoint) -> str:
    """Return the ending of the name of samples: ``samples``, and all settings that are not the default."""
    usual, everything = type(options)(), tuple(range(checkpoint.config.num_classes))
    solver, steps = usual_sampling(checkpoint)
    parts = (
        "samples",
        spec.images != usual.images and f"images{spec.images}",
        spec.solver != solver and SOLVERS[spec.solver].name,
        spec.steps != steps and f"steps{spec.steps}",
        spec.cfg != usual.cfg and f"cfg{spec.cfg:g}",
        spec.interval != usual.interval and "from{:g}to{:g}".format(*spec.interval),
        spec.guide is not None and spec.guide.label,
        spec.schedule is not None and f"schedule{spec.schedule[:8]}",
        spec.classes != everything and f"classes{short_list(spec.classes)}",
        spec.seed != usual.seed and f"seed{spec.seed}",
        options.vae is not None and "vae",
        spec.dtype != "fp32" and spec.dtype,
    )
    return label_of(*parts)


def short_list(numbers: Sequence[int]) -> str:
    """Return numbers as part of a name, such as ``0,3,7``; of long lists how many there are, and a digest."""
    text = ",".join(map(str, numbers))
    return text if len(text) <= _LONGEST else f"{len(numbers)}x{hashlib.sha256(text.encode()).hexdigest()[:6]}"


@dataclass(frozen=True)
class Running:
    """Where a model runs, and on how many images at a time."""

    batch: int = 64
    device: str = "auto"

    @property
    def runtime(self) -> Runtime:
        """Device and batch as samplers take them. Raises `UsageError` for a device that is not there."""

        from ditmoe_cli.evaluation.worker import Runtime

        return Runtime(checked_device(self.device), self.batch)


@dataclass(frozen=True)
class Accelerating(Running):
    """Where a model runs that is asked many times, and how it is sped up there."""

    compiled: bool = False
    graphs: bool | None = None

    @property
    def runtime(self) -> Runtime:
        """Device, batch and speeding up as samplers take them. Raises `UsageError` for a device that is not there."""
        return replace(super().runtime, compiled=self.compiled, graphs=self.graphs)

    def check(self, schedule: ComputeSchedule | None) -> None:
        """Raise `UsageError` for graphs beside a schedule."""
        if schedule is not None and self.graphs:
            raise UsageError(
                "⟨cuda_graphs⟩: a graph replays one step, and ⟨schedule⟩ computes other things at each; leave one out"
            )


def interval_of(levels: Sequence[float] | None) -> Interval:
    """Return the noise levels between which to guide; all where none are given. Raises `UsageError` for other lists."""
    if levels is None:
        return ALWAYS
    if len(levels) != 2:
        raise UsageError(f"an interval of {len(levels)} noise levels: give two between 0 and 1, as (0.2, 0.8)")
    return levels[0], levels[1]
