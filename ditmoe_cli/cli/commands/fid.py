"""``ditmoe fid``: how far images are from a reference, and what compression did to each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ditmoe_cli.api.argument_checks import ending, one_of
from ditmoe_cli.api.foretelling import foretell
from ditmoe_cli.cli.groups import completing
from ditmoe_cli.cli.guiding_options import Guiding, WeakGuiding, sampling_work
from ditmoe_cli.cli.options import Accelerating, Models, Overrides, Running, complete_checkpoint
from ditmoe_cli.cli.sampling_options import ImageSampling, solver_row
from ditmoe_cli.cli.stage import Stage, incoming, open_stage
from ditmoe_cli.cli.terminal import Printing, Row, columns, emit, note
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import BadInputError, GateError, UsageError
from ditmoe_cli.evaluation.images import kind_of
from ditmoe_cli.evaluation.scores.conventions import CONVENTIONS, PRECISIONS
from ditmoe_cli.evaluation.scores.metrics import DEFAULT_CONVENTION, Request, parse_scores
from ditmoe_cli.files.arrays import disk_bytes
from ditmoe_cli.files.cache import find_cache
from ditmoe_cli.files.staging import check_target
from ditmoe_cli.model.checkpoint import Checkpoint, resolve_path
from ditmoe_cli.model.config import Given
from ditmoe_cli.model.effort import Estimate
from ditmoe_cli.processes import first_process
from ditmoe_cli.progress import human_bytes

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.fid import FidSettings
    from ditmoe_cli.evaluation.fid_reuse import KeptScore
    from ditmoe_cli.evaluation.fid_score import Score
    from ditmoe_cli.evaluation.fid_sides import Comparison, Item
    from ditmoe_cli.evaluation.scores.intervals import Interval


MACHINE = Models
EXAMPLES = (
    "ditmoe fid small.safetensors --ref ckpt.pt",
    "ditmoe fid small.safetensors --ref ckpt.pt --guide-by top1 --guide-scale 0.5",
    "ditmoe fid samples.safetensors --ref images --extractor pixels --metrics all",
    "ditmoe prune ckpt.pt --keep 0.5 | ditmoe fid --max 10",
)


MOST_RESAMPLES = 1_000_000


def enough_images(count: int) -> int:
    """Return a number of images of which a distance can be taken. Raises `ValueError`."""
    if count < 2:
        raise ValueError("a distance needs at least 2 images")
    return count


def positive_distance(value: float) -> float:
    """Return a distance that may be a limit. Raises `ValueError`."""
    if not value >= 0:
        raise ValueError("give a distance of at least 0")
    return value


def enough_resamples(count: int) -> int:
    """Return a number of resamples of which an interval can be taken, or 0. Raises `ValueError`."""
    if count < 0 or count == 1:
        raise ValueError("give at least 2 resamples, or 0 for none")
    if count > MOST_RESAMPLES:
        raise ValueError(f"give at most {MOST_RESAMPLES}; an interval needs some thousands")
    return count


@dataclass(frozen=True)
class Compared:
    """The subject, and what it is compared with."""

    panel: ClassVar[str] = "Comparing"

    subjects: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="A...",
            autocompletion=complete_checkpoint,
            help="Checkpoints, samples, statistics or images to score. Without any, the result of the pipe.",
        ),
    ] = None
    ref: Annotated[
        str | None,
        typer.Option(
            "--ref",
            metavar="B",
            autocompletion=complete_checkpoint,
            help="Checkpoint, samples, statistics or images to compare with. "
            "[default: the original's samples of the same seeds]",
        ),
    ] = None
    original: Annotated[
        str | None,
        typer.Option(
            "--original",
            metavar="C",
            autocompletion=complete_checkpoint,
            help="Checkpoint or samples that the paired error is against. [default: the original of the pipe, else B]",
        ),
    ] = None
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Compare samples although they were made under other settings.")
    ] = False

    def stages(self, given: Given) -> list[Stage]:
        """Return the stage of each subject, with its path under `samples` where A names images and no checkpoint."""
        subjects: Sequence[str | None] = self.subjects or (None,)
        return [self._stage(subject, given) for subject in subjects]

    def _stage(self, subject: str | None, given: Given) -> Stage:
        stage = incoming(subject, given, shared=True)
        if stage.piped or stage.checkpoint is None or kind_of(Path(stage.checkpoint)) != "images":
            return stage
        return replace(stage, samples=stage.checkpoint, checkpoint=None, original=None)

    def has_reference(self, stage: Stage) -> bool:
        """Return whether something else than the subject itself is there to be compared with."""
        return bool(self.ref or self.original or stage.piped)


@dataclass(frozen=True)
class Images(ImageSampling):
    """Sampling for a distance."""

    images: Annotated[
        int,
        typer.Option("--images", metavar="N", callback=enough_images, help="Images to sample of each checkpoint."),
    ] = 2048


@dataclass(frozen=True)
class Scoring:
    """How images are scored."""

    panel: ClassVar[str] = "Scoring"

    extractor: Annotated[
        str | None,
        typer.Option(
            "--extractor",
            metavar="NAME",
            autocompletion=completing("inception", "pixels"),
            help="Features to compare: inception, pixels or package.module:factory. "
            "[default: what the metadata of A or B name, else inception]",
        ),
    ] = None
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights", metavar="FILE", help="Weights of Inception. [default: the cache, else downloaded once]"
        ),
    ] = None
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="fp32|bf16",
            callback=one_of(*PRECISIONS),
            help="Precision of Inception; bf16 is faster and less exact.",
        ),
    ] = "fp32"
    convention: Annotated[
        str,
        typer.Option(
            "--convention",
            metavar="NAME",
            autocompletion=completing(*CONVENTIONS),
            help="Program whose resizing and scores to follow: adm, torch-fidelity, pytorch-fid or clean-fid.",
        ),
    ] = DEFAULT_CONVENTION
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics", metavar="LIST", help="Scores beside the distance: sfid, is, pr, kid, fid-inf, or all."
        ),
    ] = None
    resamples: Annotated[
        int,
        typer.Option(
            "--bootstrap",
            metavar="N",
            callback=enough_resamples,
            help="Resamples for an interval of the distance; 0 for no interval.",
        ),
    ] = 0
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            metavar="DIR",
            help="Folder for images and features until the score is printed. [default: the cache]",
        ),
    ] = None
    statistics: Annotated[
        Path | None,
        typer.Option(
            "--save-statistics",
            metavar="FILE",
            callback=ending(".safetensors", ".npz"),
            help="FILE.npz or FILE.safetensors to write A's statistics to; without B, A is compared with itself.",
        ),
    ] = None
    limit: Annotated[
        float | None,
        typer.Option(
            "--max", metavar="X", callback=positive_distance, help="Exit with code 6 if the distance is above X."
        ),
    ] = None

    def request(self) -> Request:
        """Return the scores that are asked for. Raises `UsageError` for unknown names."""
        return Request(parse_scores(self.metrics, self.convention), self.convention, self.resamples)

    def settings(self, anyway: bool, vae: str | None, force: bool) -> FidSettings:
        """Return how to compare. Raises `UsageError` for an unknown extractor."""
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
            work=self.work.absolute() if self.work else None,
            statistics=self.statistics,
            force=force,
        )


@dataclass(frozen=True)
class ScoreFile:
    """Where the score is written beside stdout."""

    panel: ClassVar[str] = "Output"

    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            callback=ending(".safetensors"),
            help="FILE.safetensors to write the score to.",
        ),
    ] = None
    force: Annotated[
        bool, typer.Option("--force", help="Replace existing outputs, and measure anew what was kept.")
    ] = False


def run(
    compared: Compared,
    sampling: Images,
    weaker: WeakGuiding,
    running: Accelerating,
    scoring: Scoring,
    overrides: Overrides,
    to: ScoreFile,
    printing: Printing,
) -> None:
    """Score images against a reference.

    Samples A, and prints its Fréchet distance to B and the error of its images against the original's images of the
    same seeds.

    Without --ref in a pipe, the original's own samples of the same seeds are the reference, so that an unchanged model
    scores 0. The distance is called fid over Inception features and frechet over any other. Started again, the same
    command continues a run that was interrupted; torchrun's processes share the work.
    """
    stages = compared.stages(overrides.given)
    check_outputs(scoring, to, len(stages))
    settings = scoring.settings(compared.anyway, sampling.vae, to.force)
    guiding = weaker.opened(overrides.given).beside(stages[0])
    settings = replace(settings, weak=guiding.weak)
    if scoring.statistics and scoring.limit is not None and not compared.has_reference(stages[0]):
        raise UsageError("--max: there is nothing to be near to; give --ref")
    items = Items(overrides.given)
    comparisons = [items.comparison(stage, compared, alone=scoring.statistics is not None) for stage in stages]
    results = scores(comparisons, guiding.over(sampling.on(running.device), beside_copies=True), settings, running, to)
    if results is None:
        return  # another rank prints
    path = str(to.output.absolute()) if to.output else ""
    if len(results) == 1:
        result = results[0].score
        emit(printing, stages[0].done("fid", {}).to_json(result.to_json()), rows(result), path)
    else:
        files = [file_json(comparison, each) for comparison, each in zip(comparisons, results, strict=True)]
        several = replace(stages[0], checkpoint=None, original=None, samples=None, given=None)
        emit(printing, several.done("fid", {}).to_json({"files": files}), table_rows(results, files), path)
    check_limit(scoring.limit, [each.score for each in results])


def check_limit(limit: float | None, results: Sequence[Score]) -> None:
    """Raise `GateError` where a distance is above the limit."""
    above = [result for result in results if limit is not None and result.value > limit]
    if above:
        which = f"{above[0].conditions['subject']['path']}: " if len(results) > 1 else ""
        raise GateError(f"{which}{above[0].metric} {above[0].value:.4g} is above --max {limit:g}")


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
        note(f"{which} kept from an earlier run; --force measures anew")
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
            spec = specs[item.path]
            if item.checkpoint is not None and spec is not None:
                work = sampling_work(item.checkpoint, spec, running.batch, Guiding(spec.guide, weak))
                found[item.path, spec] = work
    return list(found.values())


@dataclass(frozen=True)
class Items:
    """The sides of all comparisons, each opened once."""

    given: Given
    opened: dict[tuple[Path, bool], Item] = field(default_factory=dict)

    def item(self, stage: Stage, path: str, own: bool) -> Item:
        """Return a side. The overrides of the command line hold for it unless it is the stage's `own` checkpoint."""
        from ditmoe_cli.evaluation.fid_sides import Item

        file = resolve_path(path, note).absolute()
        if (file, own) not in self.opened:
            is_checkpoint = kind_of(file) == "checkpoint"
            checkpoint = open_stage(stage, str(file), None if own else self.given) if is_checkpoint else None
            self.opened[file, own] = Item(file, checkpoint)
        return self.opened[file, own]

    def comparison(self, stage: Stage, compared: Compared, alone: bool = False) -> Comparison:
        """Return what is compared with what.

        The subject is the stage's samples or checkpoint. The original is what --original names, else a pipeline's;
        without either it is the reference. Without --ref the reference is the original, or the subject itself if that
        may stand `alone`.
        """
        from ditmoe_cli.evaluation.fid_sides import Comparison

        ref, original = compared.ref, compared.original or (stage.original if stage.piped else None)
        subject = stage.samples or stage.checkpoint
        if subject is None:
            raise BadInputError("stdin: the envelope names no checkpoint and no samples to score")
        if ref is None and original is None:
            if not alone:
                raise UsageError("nothing to compare with: give --ref (a checkpoint, samples, statistics or images)")
            ref = subject
        if stage.samples:
            note(f"scoring the images in {stage.samples}: sampling options are theirs")
        scored = self.item(stage, subject, own=True)
        first = self.item(stage, original, own=False) if original else None
        reference = self.item(stage, ref, own=False) if ref else first
        assert reference is not None
        return Comparison(scored, reference, first or reference)


def file_json(comparison: Comparison, result: KeptScore) -> dict[str, Any]:
    """Return one of several scores as JSON: path, bytes and seconds, and what a single score has."""
    path = comparison.subject.path
    return {"path": str(path), "bytes": disk_bytes(path), "seconds": result.seconds, **result.score.to_json()}


def table_rows(results: Sequence[KeptScore], files: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return several scores as one table, a row a file."""
    metric = results[0].score.metric
    evaluations = [evaluations_of(result.score) for result in results]
    lines: list[tuple[str, ...]] = [("bytes", "paired mse", metric, "seconds")]
    for result, file in zip(results, files, strict=True):
        paired = result.score.paired
        lines.append(
            (
                human_bytes(file["bytes"]),
                f"{paired.mse:.4g}" if paired else "n/a",
                f"{result.score.value:.4f}" + interval_row(result.score.interval),
                f"{result.seconds:.1f}",
            )
        )
    if len(set(evaluations)) > 1:
        lines = [(*line, cell) for line, cell in zip(lines, ("NFE an image", *evaluations), strict=True)]
    names = ["file", *(Path(file["path"]).name for file in files)]
    return list(zip(names, columns(lines), strict=True))


def rows(result: Score) -> list[Row]:
    """Return the score as a table."""
    paired = result.paired
    extractor = result.conditions["extractor"]["name"]
    error = (
        f"mse {paired.mse:.4g} over {paired.n} pairs" if paired else "none: no images of the same seeds to pair with"
    )
    psnr = f", psnr {paired.psnr:.2f} dB" if paired and paired.psnr is not None else ""
    return [
        (result.metric, f"{result.value:.4f}" + interval_row(result.interval)),
        *score_rows(result.scores),
        ("images", f"{result.images} against {result.reference_images}"),
        ("paired error", error + psnr),
        *(
            [("paired features", f"{features.estimate:.4g}{interval_row(features)}")]
            if (features := result.paired_features)
            else []
        ),
        *sampling_rows(result.conditions),
        ("extractor", extractor),
        ("subject", result.conditions["subject"]["path"]),
        ("reference", result.conditions["reference"]["path"]),
    ]


def evaluations_of(result: Score) -> str:
    """Return the evaluations that an image of the subject took, n/a where that is not known."""
    sampling = result.conditions["subject"]["sampling"]
    return str(sampling["nfe"]) if sampling else "n/a"


def sampling_rows(conditions: Mapping[str, Any]) -> list[Row]:
    """Return how the subject was sampled, and the sides that were sampled otherwise."""
    subject = conditions["subject"]["sampling"]
    rows: list[Row] = [solver_row(subject)] if subject else []
    for side in ("reference", "original"):
        sampling = conditions[side]["sampling"] if conditions[side] else None
        text = solver_row(sampling)[1] if sampling and subject else None
        if text is not None and text not in [told for _, told in rows]:
            rows.append((f"solver of the {side}", text))
    return rows


def interval_row(interval: Interval | None) -> str:
    """Return an interval as text to stand behind its value."""
    return (
        "" if interval is None else f" ({100 * interval.level:g} % interval {interval.low:.4g} to {interval.high:.4g})"
    )


def score_rows(scores: Mapping[str, Any]) -> list[Row]:
    """Return the scores beside the distance as a table."""
    rows: list[Row] = []
    for name, value in scores.items():
        if not isinstance(value, dict):
            rows.append((name, f"{value:.4f}"))
        elif "intercept" in value:
            rows.append((name, f"{value['intercept']:.4f}, slope {value['slope']:.4g} / N"))
        else:
            rows.append((name, f"{value['mean']:.4f} ± {value['deviation']:.4f}"))
    return rows
