"""Scores of images against a reference: kept from an earlier run, or measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ditmoe_cli.api.calling import AnyCheckpoint
from ditmoe_cli.api.foretelling import foretell
from ditmoe_cli.api.guiding_requests import Guiding, sampling_work
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.opening import opened
from ditmoe_cli.api.sample_runs import SampledImages
from ditmoe_cli.api.sampling_requests import Running
from ditmoe_cli.diffusion.compute_schedule import ComputeSchedule
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import UsageError
from ditmoe_cli.evaluation.images import kind_of
from ditmoe_cli.evaluation.scores.metrics import DEFAULT_CONVENTION, Request, parse_scores
from ditmoe_cli.files.cache import find_cache
from ditmoe_cli.files.staging import check_target
from ditmoe_cli.model.checkpoint import Checkpoint, resolve_path
from ditmoe_cli.model.effort import Estimate
from ditmoe_cli.processes import first_process

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.fid import FidSettings
    from ditmoe_cli.evaluation.fid_reuse import KeptScore
    from ditmoe_cli.evaluation.fid_score import Score
    from ditmoe_cli.evaluation.fid_sides import Comparison, Item

MOST_RESAMPLES = 1_000_000


def enough_images(count: int) -> int:
    """Return a number of images of which a distance can be taken. Raises `ValueError`."""
    if count < 2:
        raise ValueError("a distance needs at least 2 images")
    return count


def enough_resamples(count: int) -> int:
    """Return a number of resamples of which an interval can be taken, or 0. Raises `ValueError`."""
    if count < 0 or count == 1:
        raise ValueError("give at least 2 resamples, or 0 for none")
    if count > MOST_RESAMPLES:
        raise ValueError(f"give at most {MOST_RESAMPLES}; an interval needs some thousands")
    return count


@dataclass(frozen=True)
class Scoring:
    """How images are scored."""

    extractor: str | None = None
    weights: Path | None = None
    precision: str = "fp32"
    convention: str = DEFAULT_CONVENTION
    metrics: str | None = None
    resamples: int = 0
    work: Path | None = None
    statistics: Path | None = None

    def request(self) -> Request:
        """Return the scores that are asked for. Raises `UsageError` for unknown names."""
        return Request(parse_scores(self.metrics, self.convention), self.convention, self.resamples)

    def settings(self, anyway: bool, vae: str | None, force: bool, weak: Checkpoint | None) -> FidSettings:
        """Return how to compare, guided by `weak` if by any. Raises `UsageError` for an unknown extractor."""
        from ditmoe_cli.evaluation.features.extractors import check_extractor_name
        from ditmoe_cli.evaluation.fid import FidSettings

        if self.extractor is not None:
            check_extractor_name(self.extractor)
        return FidSettings(
            extractor=self.extractor,
            weights=self.weights,
            anyway=anyway,
            request=self.request(),
            precision=self.precision,
            vae=vae,
            weak=weak,
            work=self.work.absolute() if self.work else None,
            statistics=self.statistics,
            force=force,
        )


@dataclass(frozen=True)
class ScoreFile:
    """Where the score is written beside stdout."""

    output: Path | None = None
    force: bool = False


def check_outputs(scoring: Scoring, to: ScoreFile, count: int) -> None:
    """Raise `UsageError` where score and statistics, or the scores of several files, would be written to one file."""
    if scoring.statistics and to.output and scoring.statistics.resolve() == to.output.resolve():
        raise UsageError(f"{scoring.statistics}: named twice; give each output a name of its own")
    written = to.output or scoring.statistics
    if count > 1 and written is not None:
        raise UsageError(f"{written}: holds the score or the statistics of one file, and {count} are given")


def scores(
    comparisons: Sequence[Comparison],
    spec_of: Callable[[Checkpoint], SampleSpec],
    settings: FidSettings,
    running: Running,
    to: ScoreFile,
) -> list[KeptScore] | None:
    """Return the score of each comparison, kept from an earlier run or measured; None where another rank prints.

    Outputs are refused before anything is sampled. Torch is not imported where all scores were kept.
    """
    from ditmoe_cli.evaluation.fid_reuse import kept_score, score_key
    from ditmoe_cli.evaluation.fid_score import write_score

    inputs = [item.path for comparison in comparisons for item in comparison.items]
    inputs += [item.schedule.path for comparison in comparisons for item in comparison.items if item.schedule]
    inputs += [settings.weights] if settings.weights else []
    inputs += [settings.weak.path] if settings.weak else []
    inputs += [Path(settings.vae).expanduser()] if settings.vae else []
    for target in (to.output, settings.statistics):
        if target is not None and not target.is_file():
            check_target(target.absolute(), to.force, inputs)
    if settings.work is None and (problem := find_cache().problem):
        note(problem)
    keys = [score_key(comparison, spec_of, settings, running.device) for comparison in comparisons]
    kept = [
        kept_score(key, comparison) if key is not None and not to.force else None
        for key, comparison in zip(keys, comparisons, strict=True)
    ]
    done = [each if each is not None and each.has_statistics(settings.statistics) else None for each in kept]
    if to.output is not None and to.output.is_file() and not (done[0] and holds_score(to.output, done[0].score)):
        check_target(to.output.absolute(), to.force, inputs)
    if settings.statistics is not None and not done[0]:
        check_target(settings.statistics.absolute(), to.force, inputs)
    for each in done:
        for message in each.notes if each else ():
            note(message)
    if any(done):
        reused = sum(each is not None for each in done)
        which = "the score is" if len(done) == 1 else f"{reused} of {len(done)} scores are"
        note(f"{which} kept from an earlier run; ⟨force⟩ measures anew")
    if all(done):
        results = [each for each in done if each]
        if not first_process():
            return None
    else:
        measured = measure(comparisons, keys, done, spec_of, settings, running)
        if measured is None:
            return None
        results = measured
    if to.output is not None and not holds_score(to.output, results[0].score):
        write_score(to.output, results[0].score, to.force, inputs)
    return results


def holds_score(path: Path, score: Score) -> bool:
    """Return whether a file holds a score, as it would be written."""
    from ditmoe_cli.evaluation.fid_score import is_written

    return is_written(path, score)


def measure(
    comparisons: Sequence[Comparison],
    keys: Sequence[str | None],
    done: Sequence[KeptScore | None],
    spec_of: Callable[[Checkpoint], SampleSpec],
    settings: FidSettings,
    running: Running,
) -> list[KeptScore] | None:
    """Measure what is not done, and keep each score as it comes; return all, or None where another rank prints."""
    from ditmoe_cli.evaluation.fid import measure_distances
    from ditmoe_cli.evaluation.fid_reuse import KeptScore, keep_score, score_key

    results = list(done)
    todo = [index for index, each in enumerate(done) if each is None]
    said: list[str] = []
    expected = sampling_estimates([comparisons[index] for index in todo], spec_of, running, settings.weak)
    foretell(expected, lambda: running.runtime.device)

    def say(message: str) -> None:
        said.append(message)
        note(message)

    measured = measure_distances([comparisons[index] for index in todo], spec_of, settings, running.runtime, say)
    try:
        for index, result in zip(todo, measured, strict=True):
            if result is None:
                continue
            warnings = tuple(message for message in said if message.startswith("warning: "))
            said.clear()
            results[index] = kept = KeptScore(result.score, result.seconds, warnings)
            key = keys[index] or score_key(comparisons[index], spec_of, settings, running.device)
            if key is not None:
                keep_score(key, kept, settings.statistics, note)
    except BaseException:
        finished = sum(each is not None for each in results)
        if finished and first_process():
            note(f"kept the scores of {finished} of {len(results)} files; the same command goes on from there")
        raise
    return [each for each in results if each] if first_process() else None


def sampling_estimates(
    comparisons: Sequence[Comparison],
    spec_of: Callable[[Checkpoint], SampleSpec],
    running: Running,
    weak: Checkpoint | None = None,
) -> list[Estimate]:
    """Return what sampling takes at most, each checkpoint once in a way; kept images take nothing.

    `weak` is the checkpoint that guides, if any.
    """
    from ditmoe_cli.evaluation.fid_specs import side_specs

    found: dict[tuple[Path, SampleSpec], Estimate] = {}
    for comparison in comparisons:
        if comparison.subject.checkpoint is None:
            continue
        specs = side_specs(comparison, spec_of, weak).specs
        for item in comparison.items:
            spec = specs[item.key]
            if item.checkpoint is not None and spec is not None:
                work = sampling_work(item.checkpoint, spec, running.batch, Guiding(spec.guide, weak))
                found[item.path, spec] = work
    return list(found.values())


def by_schedule(subject: Item, schedule: ComputeSchedule | None) -> Item:
    """Return a side that is sampled by a schedule; as it is without one. Raises `UsageError` for images."""
    if schedule is None:
        return subject
    if subject.checkpoint is None:
        raise UsageError(
            f"⟨schedule⟩ {schedule.path}: {subject.path} holds no checkpoint to sample by it; leave it out"
        )
    return replace(subject, schedule=schedule)


def side_of(given: AnyCheckpoint | SampledImages) -> Item:
    """Return a side of a comparison: a checkpoint, which is opened, or the file or folder of images."""
    from ditmoe_cli.evaluation.fid_sides import Item

    if isinstance(given, Checkpoint):
        return Item(given.path.absolute(), given)
    file = (given.path if isinstance(given, SampledImages) else resolve_path(given, note)).absolute()
    return Item(file, opened(file) if kind_of(file) == "checkpoint" else None)


def compared_sides(subject: Item, ref: Item | None, original: Item | None, *, alone: bool = False) -> Comparison:
    """Return what is compared with what: without a reference the original, or the subject if that may stand `alone`.

    Without either, a subject that has a schedule is compared with itself without one. Raises `UsageError` where there
    is nothing to compare with.
    """
    from ditmoe_cli.evaluation.fid_sides import Comparison

    if ref is None and original is None and subject.schedule is not None:
        ref = replace(subject, schedule=None)
    if ref is None and original is None and not alone:
        raise UsageError("nothing to compare with: give ⟨ref⟩ (a checkpoint, samples, statistics or images)")
    reference = ref or original or subject
    return Comparison(subject, reference, original or reference)
