"""Profiles, images, scores and reports from Python: what profile-experts, sample, fid, compare, bench and report do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ditmoe_cli.api.argument_checks import at_least, ending, tuple_of
from ditmoe_cli.api.bench_runs import BenchedCheckpoints, Measuring, benched
from ditmoe_cli.api.calibration_requests import Calibrating, Profiling, profiled
from ditmoe_cli.api.calling import AnyCheckpoint, AnyPath, Count, Device, NamedDtype, Seed, alone, public
from ditmoe_cli.api.comparison_runs import ComparedCheckpoints, Comparing, ComparisonFiles, compared, pair_of
from ditmoe_cli.api.guiding_requests import StepGuiding
from ditmoe_cli.api.opening import NOTHING_GIVEN, opened
from ditmoe_cli.api.output_names import FileDestination
from ditmoe_cli.api.planning_requests import AnyProfile, profile_path
from ditmoe_cli.api.report_runs import ProfileFindings, ReportFiles, Reporting, few_enough_replicates, findings_of
from ditmoe_cli.api.sample_runs import ImageFiles, SampledImages, sampled
from ditmoe_cli.api.sampling_requests import (
    Accelerating,
    ImageSampling,
    Running,
    SamplingOptions,
    Scheduling,
    interval_of,
)
from ditmoe_cli.api.schedule_runs import ForeseenSchedule, MadeSchedule, WaySampling, scheduled_result
from ditmoe_cli.api.schedule_runs import Scheduling as Planning
from ditmoe_cli.api.score_runs import (
    ScoreFile,
    Scoring,
    by_schedule,
    check_outputs,
    compared_sides,
    enough_images,
    enough_resamples,
    scores,
    side_of,
)
from ditmoe_cli.api.sensitivity_runs import (
    ForeseenMap,
    LeavingOut,
    MapFiles,
    MappedSampling,
    chosen_parts,
    foreseen_map,
    sensitivity_of,
)
from ditmoe_cli.evaluation.scores.metrics import DEFAULT_CONVENTION
from ditmoe_cli.routing.calibration_settings import Calibration
from ditmoe_cli.routing.profile import RoutingProfile
from ditmoe_cli.routing.sensitivity.sensitivity_map import PARTS, SensitivityMap

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.fid_score import Score

OneFile = Annotated[AnyPath, ending(".safetensors")]
Picture = Annotated[AnyPath, ending(".png")]


@public
def profile(
    checkpoint: AnyCheckpoint,
    *,
    images: int | None = None,
    steps: int | None = None,
    cfg: float = 1.0,
    solver: str | None = None,
    classes: Sequence[int] | None = None,
    seed: Seed = 0,
    dtype: NamedDtype = "auto",
    data: AnyPath | None = None,
    bins: int | None = None,
    reservoir: int = Calibration.reservoir,
    fast: bool = False,
    offload: bool = False,
    batch: int = Calibration.batch,
    device: Device = "auto",
    output: OneFile | None = None,
    force: bool = False,
) -> RoutingProfile:
    """Sample a checkpoint and count how it routes, as ``ditmoe profile-experts``.

    Args:
        checkpoint: a path, ``demo:digits``, a name on the hub, or an opened checkpoint.
        images, steps, cfg, solver, classes, seed, dtype: how calibration images are sampled.
        data: images to add noise to instead of sampling.
        output: file ``….safetensors``; by default ``NAME.profile.safetensors`` in the working folder.
        force: whether to replace what stands there. A profile of the same settings is up to date without it.

    All others are the options of the same names in docs/profile-experts.md.

    Raises:
        UsageError: an argument is out of range, or has no effect beside the others.
        BadInputError: the checkpoint or the images cannot be used.
        OutputExistsError: something else stands at the output.
    """
    alone()
    found = opened(checkpoint)
    sampling = Calibrating(images, steps, cfg, solver=solver, classes=tuple_of(classes), seed=seed, dtype=dtype)
    profiling = Profiling(_path(data), bins, reservoir, fast, offload, batch, device)
    target = FileDestination(_path(output), force).at(found.path, "profile").absolute()
    result = profiled(found, sampling, profiling, target, force)
    assert result is not None
    return result


@public
def sample(
    checkpoint: AnyCheckpoint,
    *,
    images: int = SamplingOptions.images,
    steps: int | None = None,
    cfg: float = 1.0,
    cfg_interval: Sequence[float] | None = None,
    solver: str | None = None,
    upstream_exact: bool = False,
    classes: Sequence[int] | None = None,
    seed: Seed = 0,
    dtype: NamedDtype = "auto",
    vae: str | None = None,
    guide_with: AnyCheckpoint | None = None,
    guide_by: Literal["top1", "rank2"] | None = None,
    guide_scale: float | None = None,
    guide_interval: Sequence[float] | None = None,
    schedule: AnyPath | None = None,
    batch: Count = Running.batch,
    device: Device = "auto",
    compile: bool = False,
    cuda_graphs: bool | None = None,
    output: OneFile | None = None,
    png: AnyPath | None = None,
    npz: Annotated[AnyPath, ending(".npz")] | None = None,
    grid: Picture | None = None,
    force: bool = False,
) -> SampledImages:
    """Sample images, as ``ditmoe sample``.

    Args:
        checkpoint: a path, ``demo:digits``, a name on the hub, or an opened checkpoint.
        images, steps, cfg, solver, classes, seed, dtype: how to sample. Image i depends on seed, i and its label alone.
        cfg_interval, guide_interval: two noise levels, 0 to 1, between which to guide.
        vae: AutoencoderKL that decodes latents.
        schedule: file that says what blocks compute; solver, steps and guidance are then those that it is for.
        output: file ``….safetensors``; by default named after the checkpoint and the settings, in the working folder.
        png, npz, grid: other files to write the images to.
        force: whether to replace what stands there. The same images are up to date without it.

    All others are the options of the same names in docs/sample.md. Raises what `profile` does.
    """
    alone()
    found = opened(checkpoint)
    sampling = ImageSampling(
        images, steps, cfg, interval_of(cfg_interval), solver, upstream_exact, tuple_of(classes), seed, dtype, vae
    )
    guiding = StepGuiding(guide_with, guide_by, guide_scale, interval_of(guide_interval)).opened(NOTHING_GIVEN)
    files = ImageFiles(_path(output), force, _path(png), _path(npz), _path(grid))
    running = Accelerating(batch, device, compile, cuda_graphs)
    result = sampled(found, sampling, guiding, running, files, Scheduling(_path(schedule)).opened())
    assert result is not None
    return result


@public
def schedule(
    checkpoint: AnyCheckpoint,
    *,
    flops: float | None = None,
    max_damage: float | None = None,
    method: str = Planning.method,
    bins: int | None = None,
    profile: AnyProfile | None = None,
    anyway: bool = False,
    images: int = WaySampling.images,
    steps: int | None = None,
    cfg: float = 1.0,
    cfg_interval: Sequence[float] | None = None,
    solver: str | None = None,
    upstream_exact: bool = False,
    classes: Sequence[int] | None = None,
    seed: Seed = 0,
    dtype: NamedDtype = "auto",
    guide_with: AnyCheckpoint | None = None,
    guide_by: Literal["top1", "rank2"] | None = None,
    guide_scale: float | None = None,
    guide_interval: Sequence[float] | None = None,
    device: Device = "auto",
    output: OneFile | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> MadeSchedule | ForeseenSchedule:
    """Choose what each block computes in each step of one way of sampling, as ``ditmoe schedule``.

    Args:
        checkpoint: a path, ``demo:digits``, a name on the hub, or an opened checkpoint.
        flops: the most operations, as a share of all.
        max_damage: the largest squared error of the final images, relative to theirs, in place of `flops`.
        method: ``planned``, or a method for the whole model, as ``fora:2``.
        profile: a profile of the checkpoint, whose norms of experts' outputs choose thresholds of saliency.
        anyway: whether to write it also where fewer steps are better at the same cost.
        images: how many it is chosen on; errors are measured on a quarter of them.
        steps, cfg, …: the way of sampling that it is for, as for `sample`, which takes its `path` as ``schedule``.
        output: file ``….safetensors``; by default named after the checkpoint and the settings, in the working folder.
        force: whether to replace what stands there. The same schedule is up to date without it.
        dry_run: whether to choose and write nothing, and to return what that would take, a `ForeseenSchedule`.

    All others are the options of the same names in docs/schedule.md.

    Raises:
        UsageError: an argument is out of range, or has no effect beside the others.
        BadInputError: the checkpoint cannot be used.
        InfeasibleError: operations or damage cannot be that few, or fewer steps are better.
        OutputExistsError: something else stands at the output.
    """
    alone()
    found = opened(checkpoint)
    sampling = WaySampling(
        images, steps, cfg, interval_of(cfg_interval), solver, upstream_exact, tuple_of(classes), seed, dtype
    )
    guiding = StepGuiding(guide_with, guide_by, guide_scale, interval_of(guide_interval)).opened(NOTHING_GIVEN)
    planning = Planning(flops, max_damage, method, bins, profile_path(profile), anyway, device)
    return scheduled_result(found, sampling, guiding, planning, FileDestination(_path(output), force), dry_run)


@public
def score(
    subject: AnyCheckpoint | SampledImages,
    *,
    ref: AnyCheckpoint | SampledImages | None = None,
    original: AnyCheckpoint | SampledImages | None = None,
    anyway: bool = False,
    images: Annotated[int, enough_images] = 2048,
    steps: int | None = None,
    cfg: float = 1.0,
    cfg_interval: Sequence[float] | None = None,
    solver: str | None = None,
    upstream_exact: bool = False,
    classes: Sequence[int] | None = None,
    seed: Seed = 0,
    dtype: NamedDtype = "auto",
    vae: str | None = None,
    guide_with: AnyCheckpoint | None = None,
    guide_by: Literal["top1", "rank2"] | None = None,
    guide_scale: float | None = None,
    guide_interval: Sequence[float] | None = None,
    schedule: AnyPath | None = None,
    batch: Count = Running.batch,
    device: Device = "auto",
    compile: bool = False,
    cuda_graphs: bool | None = None,
    extractor: str | None = None,
    weights: AnyPath | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    convention: str = DEFAULT_CONVENTION,
    metrics: str | Sequence[str] | None = None,
    bootstrap: Annotated[int, enough_resamples] = 0,
    work: AnyPath | None = None,
    save_statistics: Annotated[AnyPath, ending(".safetensors", ".npz")] | None = None,
    output: OneFile | None = None,
    force: bool = False,
) -> Score:
    """Score images against a reference, as ``ditmoe fid``: their Fréchet distance, and errors of the same seeds.

    Args:
        subject: a checkpoint, samples, statistics or images.
        ref: the same, to compare with; by default the original's samples of the same seeds.
        original: checkpoint or samples that the paired error is against; by default the reference.
        schedule: file that says what blocks of the subject compute; other sides compute everything.
        images, steps, cfg, …: how checkpoints are sampled, as for `sample`.
        metrics: scores beside the distance, as ``["kid", "pr"]`` or ``"all"``.
        bootstrap: resamples for an interval of the distance; 0 for no interval.
        output: file ``….safetensors`` to write the score to.
        force: whether to replace it, and to measure anew what was kept from an earlier run.

    All others are the options of the same names in docs/fid.md. Raises what `profile` does.
    """
    alone()
    sampling = ImageSampling(
        images, steps, cfg, interval_of(cfg_interval), solver, upstream_exact, tuple_of(classes), seed, dtype, vae
    )
    names = metrics if metrics is None or isinstance(metrics, str) else ",".join(metrics)
    scoring = Scoring(
        extractor, _path(weights), precision, convention, names, bootstrap, _path(work), _path(save_statistics)
    )
    to = ScoreFile(_path(output), force)
    check_outputs(scoring, to, 1)
    guiding = StepGuiding(guide_with, guide_by, guide_scale, interval_of(guide_interval)).opened(NOTHING_GIVEN)
    planned, running = Scheduling(_path(schedule)).opened(), Accelerating(batch, device, compile, cuda_graphs)
    running.check(planned)
    settings = scoring.settings(anyway, vae, force, guiding.weak)
    others = [None if side is None else side_of(side) for side in (ref, original)]
    scored = by_schedule(side_of(subject), planned)
    comparison = compared_sides(scored, *others, alone=save_statistics is not None)
    spec_of = guiding.of(planned).over(sampling.on(device, schedule=planned), beside_copies=True)
    results = scores([comparison], spec_of, settings, running, to)
    assert results is not None
    return results[0].score


@public
def compare(
    a: AnyCheckpoint,
    b: AnyCheckpoint,
    *,
    images: int = SamplingOptions.images,
    steps: int | None = None,
    cfg: float = 1.0,
    solver: str | None = None,
    upstream_exact: bool = False,
    classes: Sequence[int] | None = None,
    seed: Seed = 0,
    dtype: NamedDtype = "auto",
    guide_with: AnyCheckpoint | None = None,
    guide_by: Literal["top1", "rank2"] | None = None,
    guide_scale: float | None = None,
    guide_interval: Sequence[float] | None = None,
    schedule: AnyPath | None = None,
    bins: int | None = None,
    batch: Count = Running.batch,
    device: Device = "auto",
    grid: Picture | None = None,
    output: OneFile | None = None,
    force: bool = False,
) -> ComparedCheckpoints:
    """Measure how far checkpoint `b` strays from `a` on the same seeds, as ``ditmoe compare``.

    Args:
        a, b: paths, ``demo:digits``, names on the hub, or opened checkpoints.
        images, steps, cfg, …: how both are sampled, as for `sample`.
        schedule: file that says what blocks of `b` compute; `a` computes everything.
        bins: bins of steps, from noise to image.
        grid: PNG to draw pairs of images in.
        output: file ``….safetensors`` to write the numbers to.
        force: whether to replace these, and to measure anew what was kept from an earlier run.

    All others are the options of the same names in docs/compare.md. Raises what `profile` does.
    """
    alone()
    sampling = SamplingOptions(
        images, steps, cfg, solver=solver, upstream=upstream_exact, classes=tuple_of(classes), seed=seed, dtype=dtype
    )
    guiding = StepGuiding(guide_with, guide_by, guide_scale, interval_of(guide_interval)).opened(NOTHING_GIVEN)
    planned, found = Scheduling(_path(schedule)).opened(), (opened(a), opened(b))
    guided = guiding.of(planned)
    spec_of = guided.over(sampling.on(device, schedule=planned, beside=found[1]), beside_copies=True)
    pair = pair_of(*found, spec_of, guided, Comparing(bins), planned)
    files = ComparisonFiles(_path(grid), _path(output), force)
    (kept,) = compared([pair], Running(batch, device), files.outputs)
    return ComparedCheckpoints(kept.result, kept.seconds)


@public
def bench(
    checkpoint: AnyCheckpoint,
    others: AnyCheckpoint | Sequence[AnyCheckpoint] = (),
    *,
    batch: int = Measuring.batch,
    repeats: int = Measuring.repeats,
    cfg: float = 1.0,
    guide_with: AnyCheckpoint | None = None,
    guide_by: Literal["top1", "rank2"] | None = None,
    guide_scale: float | None = None,
    schedule: AnyPath | None = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: NamedDtype = "auto",
    processor_time: bool = False,
    threads: Count | None = None,
) -> BenchedCheckpoints:
    """Measure memory and time of checkpoints on noise, as ``ditmoe bench``.

    Args:
        checkpoint: a path, ``demo:digits``, a name on the hub, or an opened checkpoint.
        others: more of them, whose steps take turns with those of the first.
        batch, repeats: images of a step, and how often each step is timed.
        schedule: file that says what blocks compute; a batch is sampled by it and without it in each round.
        threads: how many threads to time with on a CPU; by default torch's number, its half and so on, and the fastest
            counts.

    All others are the options of the same names in docs/bench.md. Raises what `profile` does.
    """
    alone()
    more = others if isinstance(others, tuple) else (others,)
    found = [opened(each) for each in (checkpoint, *more)]
    guiding = StepGuiding(guide_with, guide_by, guide_scale).opened(NOTHING_GIVEN)
    measuring, planned = (
        Measuring(batch, repeats, cfg, seed, device, dtype, processor_time),
        Scheduling(_path(schedule)),
    )
    return benched(found, measuring, guiding, threads, planned.opened())


@public
def report(
    profile: AnyProfile | AnyCheckpoint,
    *,
    replicates: Annotated[int, at_least(0), few_enough_replicates] = Reporting.replicates,
    seed: Seed = 0,
    weights: AnyCheckpoint | None = None,
    sensitivity: AnyPath | None = None,
    output: Annotated[AnyPath, ending(".html", ".htm")] | None = None,
    png: AnyPath | None = None,
    force: bool = False,
) -> ProfileFindings:
    """Report what a profile shows, and whether the paper's claims hold, as ``ditmoe report profile``.

    Args:
        profile: a profile, its path, or a checkpoint whose profile has its usual name.
        replicates, seed: of the bootstrap of intervals.
        weights: the profiled checkpoint, to compare experts by their weights too.
        sensitivity: file with the map of the profiled checkpoint, to show it too.
        output: file ``….html`` to write the report to.
        png: new folder to write the figures to.
        force: whether to replace these. A report of the same profile and settings is up to date without it.

    Raises what `profile` does.
    """
    reporting = Reporting(replicates, seed, weights, _path(sensitivity))
    return findings_of(profile, reporting, ReportFiles(_path(output), _path(png), force))


@public
def sensitivity(
    checkpoint: AnyCheckpoint,
    *,
    images: int = MappedSampling.images,
    steps: int | None = None,
    cfg: float = 1.0,
    solver: str | None = None,
    upstream_exact: bool = False,
    classes: Sequence[int] | None = None,
    seed: Seed = 0,
    dtype: NamedDtype = "auto",
    parts: Annotated[Sequence[str], chosen_parts] = tuple(PARTS),
    bins: int | None = None,
    batch: Count = 8,
    device: Device = "auto",
    output: Annotated[AnyPath, ending(".json")] | None = None,
    png: Picture | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> SensitivityMap | ForeseenMap:
    """Map the error of predictions without a part of a block, as ``ditmoe report sensitivity``.

    Args:
        checkpoint: a path, ``demo:digits``, a name on the hub, or an opened checkpoint.
        images, steps, cfg, …: how its states are sampled, as for `sample`.
        parts: what to leave out of a block, some of skip, skip-attention, skip-mixture, top1 and skip-shared.
        bins: bins of steps, from noise to image; by default one for each step, at most 50.
        output: file ``….json`` to write the map to.
        png: PNG to draw it in.
        force: whether to replace these, and to measure anew what was kept from an earlier run.
        dry_run: whether to measure nothing, and to return what that would take, a `ForeseenMap`.

    All others are the options of the same names in docs/report.md. Raises what `profile` does.
    """
    alone()
    sampling = MappedSampling(
        images, steps, cfg, solver=solver, upstream=upstream_exact, classes=tuple_of(classes), seed=seed, dtype=dtype
    )
    found = opened(checkpoint)
    leaving, running = LeavingOut(chosen_parts(parts), bins), Running(batch, device)
    if dry_run:
        return foreseen_map(found, sampling, leaving, running)
    to = MapFiles(_path(output), _path(png), force)
    return sensitivity_of(found, sampling.on(device)(found), leaving, running, to)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
