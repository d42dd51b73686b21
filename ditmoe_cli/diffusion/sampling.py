"""Sampling images: the specification, and the loop over batches, steps and guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ditmoe_cli.diffusion.compute_schedule import ComputeSchedule, ScheduledSampling, check_schedule
from ditmoe_cli.diffusion.schedule import (
    ALWAYS,
    SOLVERS,
    TRAINING_STEPS,
    Interval,
    Solver,
    check_guidance,
    evaluation_times,
    flow_times,
)
from ditmoe_cli.diffusion.watchers import UNWATCHED, Watchers
from ditmoe_cli.diffusion.weak_guidance import Guidance, Guide, check_guide_settings
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import DiTMoEConfig, Sampler
from ditmoe_cli.model.dtypes import Dtype

if TYPE_CHECKING:
    from torch import Tensor

    from ditmoe_cli.diffusion.predictor import Predictor
    from ditmoe_cli.diffusion.scheduled_guidance import Scheduled
    from ditmoe_cli.model.dit import Denoiser


@dataclass(frozen=True)
class SampleSpec:
    """The settings that determine sampled images; batch size and device do not.

    Image i has the noise of (seed, i) and the label ``classes[i mod len(classes)]``. Guidance of scale `cfg` applies at
    noise levels (0 image, 1 noise) inside `interval`. `dtype` is what the model computes in (`model.dtypes`), `guide`
    the weaker model that guides too, and `schedule` the digest of the schedule that says what is computed, if any.
    """

    images: int
    steps: int
    cfg: float
    seed: int
    solver: Solver
    classes: tuple[int, ...]
    interval: Interval = ALWAYS
    dtype: Dtype = "fp32"
    guide: Guide | None = None
    schedule: str | None = None

    @property
    def guidance(self) -> Guidance:
        """How predictions are guided."""
        return Guidance(self.family, self.cfg, self.interval, self.guide)

    @property
    def family(self) -> Sampler:
        """The family of weights that the solver integrates."""
        return SOLVERS[self.solver].family

    def labels(self, indices: Sequence[int]) -> list[int]:
        """Return the labels of the images `indices`."""
        return [self.classes[i % len(self.classes)] for i in indices]

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON, as files and keys of kept results record it; guide and schedule if there are any."""
        document = asdict(self)
        del document["guide"], document["schedule"]
        guided = {"guide": self.guide.to_json()} if self.guide else {}
        return {**document, **guided, **({"schedule": self.schedule} if self.schedule else {})}

    def conditions(self) -> dict[str, Any]:
        """Return the spec as JSON; classes 0 to n are written as ``"0-n"``."""
        is_range = self.classes == tuple(range(len(self.classes)))
        classes = f"0-{len(self.classes) - 1}" if is_range else list(self.classes)
        return {**self.to_json(), "classes": classes, "interval": list(self.interval)}

    @property
    def way(self) -> ScheduledSampling:
        """The way of sampling, which schedules of compute are for."""
        return ScheduledSampling(self.solver, self.steps, self.cfg, self.interval, self.guide)

    @property
    def whole(self) -> SampleSpec:
        """The same without a schedule: everything is computed."""
        return replace(self, schedule=None)

    def by(self, schedule: ComputeSchedule | None, checkpoint: Checkpoint) -> SampleSpec:
        """Return the spec by a schedule; as it is without one. Raises `BadInputError` as `check_schedule` does."""
        if schedule is None:
            return self
        return replace(self, schedule=check_schedule(schedule, checkpoint, self.way).digest)

    @property
    def nfe(self) -> int:
        """The number of model evaluations per image, both guidance branches and the weaker model counted."""
        return sum(self.guidance.evaluations(t) for t in evaluation_times(self.solver, self.steps))

    @property
    def weak_nfe(self) -> int:
        """The number of evaluations of the weaker model among them."""
        return sum(self.guidance.takes_weak(t) for t in evaluation_times(self.solver, self.steps))


def most_steps(solver: Solver) -> int:
    """Return the most steps that a solver takes: DDPM weights know 1,000 timesteps."""
    if SOLVERS[solver].family == "rf":
        return 100_000
    return TRAINING_STEPS - (solver == "ddpm-dpmpp-2m")  # whose timesteps leave out 0


def check_spec(spec: SampleSpec, config: DiTMoEConfig, allow_null: bool = False) -> SampleSpec:
    """Return `spec`, or raise `UsageError` where a value is out of range for a model of `config`.

    With `allow_null`, the null class is a label as others are, where the model has one.
    """
    for name, value, low, high in (
        ("images", spec.images, 1, 10**9),
        ("steps", spec.steps, 1, most_steps(spec.solver)),
    ):
        if not low <= value <= high:
            raise UsageError(f"⟨{name}⟩ {value}: must be between {low} and {high}")
    check_guidance(spec.cfg, config)
    low_noise, high_noise = spec.interval
    if not 0.0 <= low_noise < high_noise <= 1.0:
        raise UsageError(f"⟨cfg_interval⟩ {low_noise:g},{high_noise:g}: give two noise levels, 0 <= LOW < HIGH <= 1")
    if spec.guide is not None:
        check_guide_settings(spec.guide)
    labels = config.label_rows if allow_null else config.num_classes
    bad = next((c for c in spec.classes if not 0 <= c < labels), None)
    if bad is not None or not spec.classes:
        raise UsageError(f"⟨classes⟩ {bad}: the checkpoint has classes 0 to {config.num_classes - 1}")
    return spec


def check_followable(spec: SampleSpec) -> SampleSpec:
    """Return `spec`, or raise `UsageError` where steps differ in their number of model evaluations."""
    if len(evaluation_times(spec.solver, spec.steps)) != spec.steps:
        raise UsageError(
            f"⟨solver⟩ {spec.solver}: evaluates the model twice in some steps, which profiles and comparisons by step "
            "do not follow; choose another"
        )
    if spec.interval != ALWAYS:
        raise UsageError("⟨cfg_interval⟩: profiles and comparisons by step need guidance at all steps; leave it out")
    return spec


def batches(images: int, batch: int) -> Iterator[range]:
    """Yield the image indices of each batch."""
    if batch < 1:
        raise UsageError(f"⟨batch⟩ {batch}: must be at least 1")
    for start in range(0, images, batch):
        yield range(start, min(start + batch, images))


def sample_batch(
    model: Denoiser,
    spec: SampleSpec,
    indices: Sequence[int],
    watchers: Watchers = UNWATCHED,
    purpose: str = "image",
    weak: Denoiser | None = None,
    scheduled: Scheduled | None = None,
) -> Tensor:
    """Sample the images `indices`; return latents, or pixel values in [-1, 1], (N, C, S, S) in fp32.

    Each `purpose` has noise of its own for equal seeds. `weak` is the model of ``spec.guide``, by `weak_model`. Where
    compute is `scheduled`, the model is a `DiTMoE`, and no watcher is shown its blocks.

    Raises `BadInputError` where a model produces NaN or infinite values, naming image, seed and evaluation, and the
    weaker model where it is that one.
    """
    import torch

    from ditmoe_cli.diffusion.guidance import guided_predictor
    from ditmoe_cli.diffusion.noise import image_noise
    from ditmoe_cli.diffusion.solvers import integrate

    config = model.config
    shape = (config.in_channels, config.input_size, config.input_size)
    stream = image_noise(spec.seed, indices, model.device, purpose)
    labels = torch.tensor(spec.labels(indices), device=model.device)
    times = evaluation_times(spec.solver, spec.steps)
    if scheduled is None:
        predict = guided_predictor(model, labels, spec.guidance, watchers, times, weak)
    else:
        predict = _scheduled(model, labels, spec, scheduled, watchers, weak)
    finite = _FinitePredictor(predict, spec, indices, None if weak is None else _alone(weak, labels))
    with torch.inference_mode():
        asked = watchers.through(finite)
        images = integrate(spec.solver, spec.steps, asked, stream.draw(shape), lambda _: stream.draw(shape))
        finite.settle()
        return images


def _scheduled(
    model: Denoiser,
    labels: Tensor,
    spec: SampleSpec,
    scheduled: Scheduled,
    watchers: Watchers,
    weak: Denoiser | None,
) -> Predictor:
    """Return the predictor of a schedule. Raises `TypeError` for a model that is not in memory as a whole."""
    from ditmoe_cli.diffusion.scheduled_guidance import scheduled_predictor
    from ditmoe_cli.model.dit import DiTMoE

    if not isinstance(model, DiTMoE) or watchers.observer is not None or watchers.on_step is not None:
        raise TypeError("a schedule takes a model in memory, which nobody watches")
    return scheduled_predictor(model, labels, spec.guidance, evaluation_times(spec.solver, spec.steps), scheduled, weak)


def _alone(model: Denoiser, labels: Tensor) -> Predictor:
    """Return the predictor of the conditional branch of a model."""
    return lambda x, t: model.prepared([t], labels)(x, t)


class _FinitePredictor:
    """A predictor that raises `BadInputError` for the first image whose prediction is not finite.

    On a GPU a prediction is looked at when the next one has been asked for, so that the device need not wait for the
    host; `settle` looks at the last one. The weaker model, if any, is then asked again whether it was that one.
    """

    def __init__(
        self, predict: Predictor, spec: SampleSpec, indices: Sequence[int], weak: Predictor | None = None
    ) -> None:
        self._predict, self._spec, self._indices, self._weak = predict, spec, indices, weak
        self._evaluations = 0
        self._unseen: _Unseen | None = None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Return the prediction for x (N, C, S, S) at time t."""
        output = self._predict(x, t)
        self._evaluations += 1
        finite = output.isfinite().flatten(1).all(dim=1)
        self.settle()
        self._unseen = _Unseen(finite, self._evaluations, x, t)
        if not output.is_cuda:
            self.settle()
        return output

    def settle(self) -> None:
        """Look at the last prediction, where that is still to be done."""
        if self._unseen is None:
            return
        unseen, self._unseen = self._unseen, None
        if bool(unseen.finite.all()):
            return
        first = int((~unseen.finite).nonzero()[0])
        spec = self._spec
        raise BadInputError(
            f"sampling produced NaN or infinite values in image {self._indices[first]} (seed {spec.seed}) at "
            f"evaluation {unseen.number} of {len(evaluation_times(spec.solver, spec.steps))}"
            f"{self._culprit(unseen)}; {_suspicion(spec)}"
        )

    def _culprit(self, unseen: _Unseen) -> str:
        """Return which of two models it was; nothing where there is one."""
        guide = self._spec.guide
        if self._weak is None or guide is None:
            return ""
        named = f"routing {guide.model}" if guide.rank is not None else f"of fingerprint {guide.model[:12]}…"
        broken = not bool(self._weak(unseen.x, unseen.t).isfinite().all())
        return f", in the weaker model ({named})" if broken else ", in the guided model, not the weaker one"


@dataclass(frozen=True)
class _Unseen:
    """Which images of an evaluation, counted from 1, are finite (N,), and what was asked for there."""

    finite: Tensor
    number: int
    x: Tensor
    t: float


def _suspicion(spec: SampleSpec) -> str:
    """Return what may be wrong where values are not finite: in fp16 the dtype, whose largest value is 65,504."""
    if spec.dtype == "fp16":
        return "values above 65,504 are infinite in fp16: give ⟨dtype⟩ fp32, or bf16"
    return f"is ⟨sampler⟩ {spec.family} right for these weights?"


def visit_noised(
    model: Denoiser,
    spec: SampleSpec,
    indices: Sequence[int],
    clean: Tensor,
    watchers: Watchers = UNWATCHED,
    purpose: str = "image",
) -> None:
    """Evaluate the model on images `clean` (N, C, S, S) in [-1, 1], noised to each of the times that `spec` samples at.

    Watchers so see inputs of the forward process from data, not of the model's own trajectories. Each image has the
    same noise at all times.
    """
    import torch

    from ditmoe_cli.diffusion.guidance import guided_predictor
    from ditmoe_cli.diffusion.noise import image_noise

    clean = clean.to(model.device)
    noise = image_noise(spec.seed, indices, model.device, purpose).draw(clean.shape[1:])
    labels = torch.tensor(spec.labels(indices), device=model.device)
    times = sampling_times(spec)
    asked = [time.t for time in times]
    guidance = Guidance(spec.family, spec.cfg)
    predict = watchers.through(guided_predictor(model, labels, guidance, watchers, asked))
    with torch.inference_mode():
        for time in times:
            predict(time.noised(clean, noise), time.t)


@dataclass(frozen=True)
class SamplingTime:
    """The time `t` of a model evaluation, and the forward process ``noised(clean, noise)`` to that time."""

    t: float
    noised: Callable[[Tensor, Tensor], Tensor]


def sampling_times(spec: SampleSpec) -> list[SamplingTime]:
    """Return the times of all steps, beginning with noise. Raises `UsageError` as `check_followable` does."""
    from ditmoe_cli.diffusion.forward_process import noised, sampling_schedule

    check_followable(spec)
    if spec.family == "rf":
        return [_rectified(t) for t in flow_times(spec.steps)]
    schedule = sampling_schedule(spec.solver, spec.steps)

    def at(step: int) -> SamplingTime:
        return SamplingTime(
            schedule.timesteps[step], lambda clean, noise: noised(clean, noise, schedule.alphas_bar[step])
        )

    return [at(step) for step in reversed(range(spec.steps))]


def _rectified(t: float) -> SamplingTime:
    from ditmoe_cli.diffusion.forward_process import interpolate

    return SamplingTime(t, lambda clean, noise: interpolate(clean, noise, clean.new_full((len(clean),), t)))
