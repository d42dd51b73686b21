"""Benchmark of checkpoints: memory, seconds of a denoising step, operations a second, and time by part of the model.

Steps of several checkpoints are timed in rounds, each in another order, so that what slows the machine for a while
slows all of them; the ratios of a round are then those of the checkpoints. Where they do not fit in memory together,
they are timed one after the other, and a round has one of them.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditmoe_cli.diffusion.compute_schedule import ComputeSchedule, check_schedule
from ditmoe_cli.diffusion.few_steps import check_unguided, usual_sampling
from ditmoe_cli.diffusion.guidance import guided_predictor
from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.schedule import SOLVERS, check_guidance
from ditmoe_cli.diffusion.scheduled_guidance import Scheduled, loaded_schedule
from ditmoe_cli.diffusion.weak_guidance import Guidance, Guide, check_guide
from ditmoe_cli.diffusion.weak_models import weak_model
from ditmoe_cli.errors import UsageError
from ditmoe_cli.evaluation.computed_share import Computed, computed_by, rows_of
from ditmoe_cli.evaluation.memory_use import (
    Footprint,
    Memory,
    available_bytes,
    footprint,
    let_go,
    loaded_bytes,
    peak_during,
    private_bytes,
    tensor_bytes,
)
from ditmoe_cli.evaluation.sampled_models import guided_as, model_of
from ditmoe_cli.evaluation.step_parts import (
    Clock,
    Stopwatch,
    routed_step,
    share_rerouted,
    slots_of,
    step_parts,
    stopwatch,
)
from ditmoe_cli.formats.unpacked_weights import UnpackedWeights, unpacked_weights
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.dtypes import Dtype, relative_difference, torch_dtype_of
from ditmoe_cli.model.effort import activation_bytes, evaluation_flops
from ditmoe_cli.model.loading import build_model, empty_model
from ditmoe_cli.model.scheduled import ComputeCount
from ditmoe_cli.model.throughput import Rate, peak_rate
from ditmoe_cli.progress import Phase, phase

MOST_IMAGES, MOST_REPEATS = 65_536, 10_000  # of a pass, and of rounds
WARM_UPS = 2  # passes that memory is measured in; the first also allocates buffers of kernels and allocator
MOST_TRACED = 5  # passes that are timed by part


@dataclass(frozen=True)
class Load:
    """The work to time: `batch` images in one pass (twice as many rows where `cfg` is not 1), in `repeats` rounds.

    On the CPU it is timed with each number of `threads`; with none given, with as many as torch uses. With
    `processor_time`, one thread computes, and its processor time counts in place of the clock on the wall. With `guide`
    a pass asks the weaker model too.
    """

    batch: int = 8
    repeats: int = 5
    cfg: float = 1.0
    seed: int = 0
    device: str = "cpu"
    threads: tuple[int, ...] = ()
    dtype: Dtype = "fp32"
    processor_time: bool = False
    guide: Guide | None = None

    @property
    def rows(self) -> int:
        """Rows of one forward pass: images times guidance branches."""
        return self.batch * (1 if self.cfg == 1.0 else 2)

    @property
    def clock(self) -> Clock:
        """The clock that times."""
        return time.process_time if self.processor_time else time.perf_counter

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of threads to time with; one on a GPU, that torch uses."""
        if self.processor_time:
            return (1,)
        return self.threads if self.threads and not self.device.startswith("cuda") else (torch.get_num_threads(),)

    @property
    def traced(self) -> int:
        """The number of passes that are timed by part."""
        return min(self.repeats, MOST_TRACED)

    @property
    def passes(self) -> int:
        """The number of forward passes of one checkpoint."""
        reference = 0 if self.dtype == "fp32" else 1
        routed = 1 if self.guide is None else 2
        return reference + WARM_UPS + routed + (1 + self.repeats) * len(self.counts) + self.traced


@dataclass(frozen=True)
class Difference:
    """How far computing in another dtype strays from fp32, on the same noise.

    Attributes:
        prediction: the norm of the difference of guided predictions over the norm of that in fp32.
        rerouted: the share of tokens, over all blocks, whose experts are another set.
    """

    prediction: float
    rerouted: float


@dataclass(frozen=True)
class Speed:
    """Operations of a step, the most that this machine does a second in the dtype of computation, and time by part.

    The seconds by part are those of one traced pass, and add up to it; `flops` follow from shapes and routing.
    """

    flops: float
    peak: Rate
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Bench:
    """A checkpoint's footprint, its memory, its speed, and the seconds of each timed pass by the number of threads.

    `threads` is the number that the seconds hold for; `difference` is None in fp32. `kept` are the bytes of unpacked
    weights that steps left in memory for the next, beside what is needed; `weak` those of the weaker model's weights.
    `spec` says how an image is sampled.
    """

    load: Load
    spec: SampleSpec
    time: float
    footprint: Footprint
    memory: Memory
    timed: Mapping[int, tuple[float, ...]]
    threads: int
    speed: Speed
    difference: Difference | None = None
    kept: int = 0
    weak: int = 0

    @property
    def seconds(self) -> tuple[float, ...]:
        """The seconds of each pass with that number of threads, in the order of rounds."""
        return self.timed[self.threads]

    @property
    def image_seconds(self) -> float:
        """Seconds that the evaluations of an image take in such batches, by the fastest pass."""
        in_a_pass = self.spec.guidance.evaluations(self.time)
        return min(self.seconds) / self.load.batch * self.spec.nfe / in_a_pass

    @property
    def rate(self) -> float:
        """Operations a second of the fastest pass."""
        return self.speed.flops / min(self.seconds)

    @property
    def least(self) -> int:
        """Bytes of all weights and of the largest buffer."""
        return self.footprint.least + self.weak

    @property
    def needed(self) -> int:
        """Bytes of weights and working memory: the measured growth, but at least the counted bytes.

        Weights of a mapped pickle are pages of the file, which are needed but are no private memory.
        """
        return max(self.least, self.memory.growth or 0)

    def to_json(self) -> dict[str, Any]:
        """Return bytes, memory, seconds, speed and conditions as JSON."""
        footprint, growth, least = self.footprint, self.memory.growth, min(self.seconds)
        traced = sum(self.speed.parts.values())
        given = asdict(self.load)
        del given["processor_time"], given["guide"]
        guided = {"guide": self.load.guide.to_json(), "weak_bytes": self.weak} if self.load.guide else {}
        return {
            "bytes": {
                "file": footprint.file,
                "weights": asdict(footprint.weights),
                "fp32": asdict(footprint.fp32),
                "ratio": footprint.ratio,
                "buffer": asdict(footprint.buffer),
            },
            "memory": {
                **asdict(self.memory),
                "growth": growth,
                "beyond": None if growth is None else growth - self.least,
                "needed": self.needed,
                "kept": self.kept,
            },
            "seconds": least,
            "median_seconds": statistics.median(self.seconds),
            "seconds_by_threads": {str(count): min(seconds) for count, seconds in self.timed.items()},
            "images_per_second": self.load.batch / least,
            "image": {
                "solver": SOLVERS[self.spec.solver].name,
                "steps": self.spec.steps,
                "nfe": self.spec.nfe,
                "seconds": self.image_seconds,
            },
            "flops": self.speed.flops,
            "flops_per_second": self.rate,
            "peak_flops_per_second": self.speed.peak.flops,
            "share_of_peak": self.rate / self.speed.peak.flops,
            "parts": {
                "seconds": dict(self.speed.parts),
                "shares": {part: seconds / traced for part, seconds in self.speed.parts.items()},
                "traced_seconds": traced,
            },
            "difference": asdict(self.difference) if self.difference else None,
            "conditions": {
                **given,
                "t": self.time,
                "threads": self.threads,
                "waiting": waiting(),
                "clock": "processor" if self.load.processor_time else "wall",
                **guided,
            },
        }


@dataclass(frozen=True)
class Spread:
    """Quartiles of a ratio of two checkpoints' seconds over the rounds, and the ratio of their least seconds."""

    median: float
    low: float
    high: float
    least: float


def spread(seconds: Sequence[float], reference: Sequence[float]) -> Spread:
    """Return the spread of the ratios of seconds to those of the reference in the same rounds."""
    ratios = [here / there for here, there in zip(seconds, reference, strict=True)]
    low, median, high = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Spread(median, low, high, min(seconds) / min(reference))


@dataclass(frozen=True)
class ScheduledBench:
    """What sampling a batch by a schedule took, beside sampling it with everything computed.

    Attributes:
        index: of the checkpoint among those that were measured.
        schedule: the schedule.
        computed: what it computed.
        seconds: of sampling the batch by the schedule, in each round.
        whole: the same where everything is computed.
    """

    index: int
    schedule: ComputeSchedule
    computed: Computed
    seconds: tuple[float, ...]
    whole: tuple[float, ...]

    @property
    def ratio(self) -> Spread:
        """The share of the seconds that it took."""
        return spread(self.seconds, self.whole)

    @property
    def step_seconds(self) -> float:
        """The mean seconds of its steps, of the fastest round."""
        return min(self.seconds) / self.schedule.table.evaluations

    def to_json(self) -> dict[str, Any]:
        """Return method, shares of operations and seconds, seconds of a mean step and bytes kept, as JSON."""
        way = self.schedule.sampling
        return {
            **self.computed.to_json(),
            "digest": self.schedule.digest,
            "solver": SOLVERS[way.solver].name,
            "steps": way.steps,
            "ratio": asdict(self.ratio),
            "seconds": min(self.seconds),
            "step_seconds": self.step_seconds,
        }


@dataclass(frozen=True)
class Benches:
    """The results of some checkpoints in their order, whether their steps took turns, and that of a schedule."""

    results: tuple[Bench, ...]
    interleaved: bool
    scheduled: ScheduledBench | None = None

    @property
    def ratios(self) -> list[Spread]:
        """The ratio of each checkpoint's seconds to the first's."""
        return [spread(result.seconds, self.results[0].seconds) for result in self.results]


def check_load(load: Load, config: DiTMoEConfig) -> Load:
    """Return `load`, or raise `UsageError` where a value is out of range for a model of `config`."""
    for name, value, most in (("batch", load.batch, MOST_IMAGES), ("repeats", load.repeats, MOST_REPEATS)):
        if not 1 <= value <= most:
            raise UsageError(f"⟨{name}⟩ {value}: must be at least 1, and at most {most}")
    if load.processor_time and (load.device.startswith("cuda") or set(load.threads) - {1}):
        raise UsageError(
            "⟨processor_time⟩ times one thread of the CPU: give ⟨device⟩ cpu, and no other ⟨threads⟩ than 1"
        )
    check_guidance(load.cfg, config)
    return load


def image_specs(checkpoints: Sequence[Checkpoint], load: Load) -> dict[Path, SampleSpec]:
    """Return by path how each checkpoint is sampled: as usual, with the guidance of `load`; a distilled one by its own.

    An original beside a distilled copy of it has the guidance that is in the copy's weights. Raises `UsageError` for
    guidance of a distilled checkpoint.
    """
    specs: dict[Path, SampleSpec] = {}
    for checkpoint in checkpoints:
        check_unguided(checkpoint, load.cfg)
        solver, steps = usual_sampling(checkpoint)
        specs[checkpoint.path] = SampleSpec(
            load.batch, steps, load.cfg, load.seed, solver, (0,), dtype=load.dtype, guide=load.guide
        )
    if any(checkpoint.distilled is not None for checkpoint in checkpoints):
        models = {checkpoint.path: model_of(checkpoint) for checkpoint in checkpoints}
        return {path: guided_as(spec, models[path], models.values()) for path, spec in specs.items()}
    return specs


def fit_together(checkpoints: Sequence[Checkpoint], load: Load, weak: Checkpoint | None = None) -> bool:
    """Return whether the models of all checkpoints have room in memory at once, with the largest one's activations.

    Each has a copy of the weaker model `weak`, if any, beside it.
    """
    working = max(activation_bytes(checkpoint.config, load.rows) for checkpoint in checkpoints)
    guiding = len(checkpoints) * loaded_bytes(weak) if weak is not None else 0
    return sum(map(loaded_bytes, checkpoints)) + guiding + working <= available_bytes(torch.device(load.device))


def bench(
    checkpoints: Sequence[Checkpoint],
    load: Load,
    clock: Clock | None = None,
    weak: Checkpoint | None = None,
    schedule: ComputeSchedule | None = None,
) -> Benches:
    """Run denoising steps of checkpoints on noise at a time in the middle of their families' ranges.

    All are loaded, and their steps take turns; where memory is too small for that, they follow each other. The number
    of threads is the same for all: that of the least product of least seconds, of those who come first where they
    follow each other. Seconds are those of `clock`, by default of `load`. `weak` is the checkpoint that guides, if any;
    its memory is counted for each. Of the checkpoint that a `schedule` is for, a batch is sampled by it in each round
    too, and without it.

    Raises `UsageError` for values of `load` out of range, `BadInputError` for a checkpoint that cannot be loaded, or be
    guided so.
    """
    specs = image_specs(checkpoints, load)
    for checkpoint in checkpoints:
        check_load(load, checkpoint.config)
        check_guide(specs[checkpoint.path].guide, checkpoint, weak)
    most = replace(load, cfg=max(spec.cfg for spec in specs.values()))
    together = len(checkpoints) == 1 or fit_together(checkpoints, most, weak)
    passes = sum(guided_load(load, specs[checkpoint.path]).passes for checkpoint in checkpoints)
    planned = None
    if schedule is not None:
        planned = planned_index(schedule, checkpoints, load)
        passes += scheduled_passes(schedule, load)
    named = checkpoints[0].name if len(checkpoints) == 1 else f"{len(checkpoints)} checkpoints"
    results: list[Bench] = []
    scheduled: list[ScheduledBench] = []
    with phase(f"measuring {named}", passes, "passes") as progress:
        for group in [checkpoints] if together else [[checkpoint] for checkpoint in checkpoints]:
            counts = (results[0].threads,) if results else load.counts
            work = _Work(replace(load, threads=counts), weak, progress, specs)
            by = None
            if schedule is not None and planned is not None and checkpoints[planned] in group:
                by = _Planned(schedule, group.index(checkpoints[planned]), planned, scheduled)
            results += _taking_turns(work, group, clock or load.clock, by)
    found = tuple(replace(each, load=replace(each.load, threads=load.threads)) for each in results)
    return Benches(found, together, scheduled[0] if scheduled else None)


@dataclass(frozen=True)
class _Planned:
    """A schedule, the place of its checkpoint among those in memory and among all, and the list for what is found."""

    schedule: ComputeSchedule
    place: int
    index: int
    found: list[ScheduledBench]


def planned_index(schedule: ComputeSchedule, checkpoints: Sequence[Checkpoint], load: Load) -> int:
    """Return which checkpoint a schedule is for. Raises `BadInputError` where it is for none, or for other guidance."""
    prints = [checkpoint.fingerprint for checkpoint in checkpoints]
    index = prints.index(schedule.checkpoint) if schedule.checkpoint in prints else 0
    way = replace(schedule.sampling, cfg=load.cfg, guide=load.guide)
    check_schedule(schedule, checkpoints[index], way)
    return index


def scheduled_passes(schedule: ComputeSchedule, load: Load) -> int:
    """Return the evaluations of sampling a batch by a schedule and without it, in each round."""
    return 2 * schedule.table.evaluations * load.repeats * len(load.counts)


def guided_load(load: Load, spec: SampleSpec) -> Load:
    """Return the work to time with the guidance of a spec."""
    return replace(load, cfg=spec.cfg, guide=spec.guide)


@dataclass(frozen=True)
class _Work:
    """What is measured, the checkpoint that guides, if any, the phase that counts passes, and specs by path."""

    load: Load
    weak: Checkpoint | None
    progress: Phase
    specs: Mapping[Path, SampleSpec]

    def of(self, checkpoint: Checkpoint) -> _Work:
        """Return the work with the guidance of a checkpoint."""
        return replace(self, load=guided_load(self.load, self.specs[checkpoint.path]))

    @property
    def device(self) -> torch.device:
        """The device of all models."""
        return torch.device(self.load.device)

    def weaker(self, model: DiTMoE, load: Callable[[Checkpoint], DiTMoE]) -> DiTMoE | None:
        """Return the model that guides another one, loaded as that was; None without any."""

        def guiding() -> DiTMoE:
            assert self.weak is not None  # as `check_guide` saw to
            return load(self.weak)

        found = weak_model(model, self.load.guide, guiding)
        assert found is None or isinstance(found, DiTMoE)
        return found


@dataclass(frozen=True)
class _Loaded:
    """A model in memory, the weaker one that guides it, if any, their step, and what was found while they were loaded.

    `weak_bytes` are those of the weaker model's own weights.
    """

    model: DiTMoE
    weak: DiTMoE | None
    step: Callable[[], Tensor]
    footprint: Footprint
    memory: Memory
    unpacked: UnpackedWeights
    weak_bytes: int

    @property
    def models(self) -> list[DiTMoE]:
        """All models that a step asks."""
        return [self.model] if self.weak is None else [self.model, self.weak]

    def flops(self, load: Load, chosen: Sequence[Tensor]) -> float:
        """Return the operations of a step in which the routers of the model chose experts (T, k)."""
        found = evaluation_flops(self.model.config, load.rows, slots_of(self.model, chosen))
        if self.weak is None:
            return found
        _, by_weak = routed_step(self.weak, self.step)
        return found + evaluation_flops(self.weak.config, load.batch, slots_of(self.weak, by_weak))


def _taking_turns(
    work: _Work, checkpoints: Sequence[Checkpoint], clock: Clock, planned: _Planned | None = None
) -> list[Bench]:
    """Return the results of checkpoints that are in memory at once; that of a schedule is added to what it found."""
    load, device, progress = work.load, work.device, work.progress
    watch = stopwatch(device, clock)
    references = [_reference(checkpoint, work.of(checkpoint)) for checkpoint in checkpoints]
    with using_threads(load.counts[0]):
        loaded = [_load(checkpoint, work.of(checkpoint)) for checkpoint in checkpoints]
    steps: list[_Step] = [(each.step, 1) for each in loaded]
    counts: list[ComputeCount] = []
    if planned is not None:
        own, each = work.of(checkpoints[planned.place]).load, loaded[planned.place]
        by = loaded_schedule(planned.schedule, device, counts.append)
        samplings = [batch_sampling(each.model, own, planned.schedule, each.weak, how) for how in (None, by)]
        steps += [(sampling, planned.schedule.table.evaluations) for sampling in samplings]
    timed = _timed_rounds(steps, load, partial(_seconds, clock, watch), progress)
    threads = best_count(timed)
    if planned is not None:
        checkpoint = checkpoints[planned.place]
        computed = computed_by(planned.schedule, checkpoint.config, rows_of(counts[-1], own.batch))
        whole, seconds = timed[threads][-2:]
        planned.found.append(ScheduledBench(planned.index, planned.schedule, computed, seconds, whole))
    with using_threads(threads):
        peak = peak_rate(str(device), load.dtype, threads, clock)
        results = []
        for index, (each, reference) in enumerate(zip(loaded, references, strict=True)):
            own = work.of(checkpoints[index]).load
            output, chosen = routed_step(each.model, each.step)
            flops = each.flops(own, chosen)
            parts = step_parts(each.models, each.step, load.traced, watch)
            progress(len(each.models) + load.traced)
            results.append(
                Bench(
                    load=own,
                    spec=work.specs[checkpoints[index].path],
                    time=each.model.config.middle_time,
                    footprint=each.footprint,
                    memory=each.memory,
                    timed={count: seconds[index] for count, seconds in timed.items()},
                    threads=threads,
                    speed=Speed(flops, peak, parts),
                    difference=None if reference is None else difference((output, chosen), reference),
                    kept=each.unpacked.kept_bytes,
                    weak=each.weak_bytes,
                )
            )
    return results


def _load(checkpoint: Checkpoint, work: _Work) -> _Loaded:
    """Load a checkpoint and measure memory in `WARM_UPS` passes, which are not timed since measuring slows them.

    They keep no unpacked weights, so that memory is what running needs at the least.
    """
    load, device = work.load, work.device
    empty = empty_model(checkpoint)  # before measuring, since it makes torch import modules
    let_go()
    before = private_bytes(device)
    unpacked = unpacked_weights()

    def ready(each: Checkpoint) -> DiTMoE:
        return build_model(each, device, torch_dtype_of(load.dtype), unpacked).prepack()

    model = ready(checkpoint)
    weak = work.weaker(model, ready)
    loaded = private_bytes(device)
    step = denoising_step(model, load, weak)

    def warm_up() -> None:
        for _ in range(WARM_UPS):
            step()
            work.progress(1)

    with unpacked.paused():
        peak = peak_during(device, warm_up)
    own = 0 if weak is None or work.weak is None else tensor_bytes(weak)
    return _Loaded(model, weak, step, footprint(checkpoint, model, empty), Memory(before, loaded, peak), unpacked, own)


_Step = tuple[Callable[[], object], int]
"""What is timed, and how many passes it makes: one is made before, so that threads have started."""


def _timed_rounds(
    steps: Sequence[_Step], load: Load, seconds_of: Callable[[Callable[[], object]], float], progress: Phase
) -> dict[int, list[tuple[float, ...]]]:
    """Return by number of threads, for each of the steps, its seconds in each round."""
    timed: dict[int, list[tuple[float, ...]]] = {}
    for count in in_turn(load.counts):
        found: list[list[float]] = [[] for _ in steps]
        for step in (step for step, passes in steps if passes == 1):  # starts the threads
            step()
            progress(1)
        for order in rounds(len(steps), load.repeats):
            for index in order:
                step, passes = steps[index]
                found[index].append(seconds_of(step))
                progress(passes)
        timed[count] = [tuple(seconds) for seconds in found]
    return timed


def rounds(checkpoints: int, count: int) -> list[list[int]]:
    """Return the order of checkpoints in each round: shuffled, since each leaves its own weights in the caches."""
    generator = random.Random(0)
    return [generator.sample(range(checkpoints), checkpoints) for _ in range(count)]


def best_count(timed: Mapping[int, Sequence[Sequence[float]]]) -> int:
    """Return the number of threads of the least product of the models' least seconds; the fewest of equal ones."""
    return min(sorted(timed), key=lambda count: sum(log(max(min(seconds), 1e-12)) for seconds in timed[count]))


def _seconds(clock: Clock, watch: Stopwatch, step: Callable[[], object]) -> float:
    """Return the seconds of a step, until its work on the device ends."""
    watch.wait()
    start = clock()
    step()
    watch.wait()
    return clock() - start


def thread_counts(most: int) -> tuple[int, ...]:
    """Return the numbers of threads that are worth a try: `most`, and its halves down to 1."""
    return tuple(most >> shift for shift in range(most.bit_length()))


def in_turn(counts: Iterable[int]) -> Iterator[int]:
    """Yield numbers of threads, each set for torch while it is the current one, and then set what was set before."""
    for count in counts:
        with using_threads(count):
            yield count


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Have torch compute with that many threads while the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def waiting() -> str:
    """Return how OpenMP's threads wait: as OMP_WAIT_POLICY says, else by the rounds they spin before they sleep."""
    rounds = os.environ.get("GOMP_SPINCOUNT", "as the runtime sees fit")
    return os.environ.get("OMP_WAIT_POLICY", f"spin {rounds}").lower()


def denoising_step(model: DiTMoE, load: Load, weak: DiTMoE | None = None) -> Callable[[], Tensor]:
    """Return a function that predicts once from noise (N, C, S, S): that of (seed, i), with label i mod classes.

    `weak` is the model of the load's guide, if any.
    Each call embeds its time and labels anew, as each step of a sampling run has a time of its own.
    """
    config = model.config
    x = image_noise(load.seed, range(load.batch), model.device).draw(
        (config.in_channels, config.input_size, config.input_size)
    )
    labels = torch.arange(load.batch, device=model.device) % config.num_classes
    t = config.middle_time
    guidance = Guidance(config.sampler, load.cfg, guide=load.guide)

    def step() -> Tensor:
        with torch.inference_mode():
            predict = guided_predictor(model, labels, guidance, times=[t], weak=weak)
            return predict(x, t)[:, : config.in_channels]  # DDPM's learned variance is no prediction

    return step


def batch_sampling(
    model: DiTMoE, load: Load, schedule: ComputeSchedule, weak: DiTMoE | None, by: Scheduled | None
) -> Callable[[], Tensor]:
    """Return a function that samples the batch of a load in the way of a schedule, from the noise of `denoising_step`.

    It computes what `by` says, or everything. Conditions are embedded once a run, as in sampling.
    """
    way = schedule.sampling
    classes = tuple(index % model.config.num_classes for index in range(load.batch))
    spec = SampleSpec(
        load.batch, way.steps, way.cfg, load.seed, way.solver, classes, way.interval, load.dtype, way.guide
    )
    return lambda: sample_batch(model, spec, range(load.batch), weak=weak, scheduled=by)


# ------------------------------------------------------------------ against fp32

_Routed = tuple[Tensor, list[Tensor]]


def _reference(checkpoint: Checkpoint, work: _Work) -> _Routed | None:
    """Return the prediction and the chosen experts in fp32; None where that is the dtype to time."""
    if work.load.dtype == "fp32":
        return None
    model = build_model(checkpoint, work.device)
    weak = work.weaker(model, lambda each: build_model(each, work.device))
    result = routed_step(model, denoising_step(model, work.load, weak))
    work.progress(1)
    return result


def difference(found: _Routed, reference: _Routed) -> Difference:
    """Return how far a prediction (N, C, S, S) and chosen experts (T, k) of each block are from those of fp32."""
    (output, chosen), (exact, chosen_exactly) = found, reference
    return Difference(relative_difference(output, exact), share_rerouted(chosen, chosen_exactly))
