"""``ditmoe fid``: how far images are from a reference, and what compression did to each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ditmoe_cli.api import score_runs as asked
from ditmoe_cli.api.argument_checks import ending, one_of
from ditmoe_cli.api.score_runs import (
    by_schedule,
    check_outputs,
    compared_sides,
    enough_images,
    enough_resamples,
    scores,
)
from ditmoe_cli.cli.groups import completing
from ditmoe_cli.cli.guiding_options import WeakGuiding, beside
from ditmoe_cli.cli.options import Accelerating, Models, Overrides, complete_checkpoint
from ditmoe_cli.cli.sampling_options import ImageSampling, Scheduling, schedule_rows, scheduled, solver_row
from ditmoe_cli.cli.stage import Stage, incoming, open_stage
from ditmoe_cli.cli.terminal import Printing, Row, columns, emit, note
from ditmoe_cli.diffusion.compute_schedule import ComputeSchedule
from ditmoe_cli.errors import BadInputError, GateError, UsageError
from ditmoe_cli.evaluation.images import kind_of
from ditmoe_cli.evaluation.scores.conventions import CONVENTIONS, PRECISIONS
from ditmoe_cli.evaluation.scores.metrics import DEFAULT_CONVENTION
from ditmoe_cli.files.arrays import disk_bytes
from ditmoe_cli.model.checkpoint import resolve_path
from ditmoe_cli.model.config import Given
from ditmoe_cli.progress import human_bytes

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.fid_reuse import KeptScore
    from ditmoe_cli.evaluation.fid_score import Score
    from ditmoe_cli.evaluation.fid_sides import Comparison, Item
    from ditmoe_cli.evaluation.scores.intervals import Interval


MACHINE = Models
EXAMPLES = (
    "ditmoe fid small.safetensors --ref ckpt.pt",
    "ditmoe fid small.safetensors --ref ckpt.pt --guide-by top1 --guide-scale 0.5",
    "ditmoe fid ckpt.pt --schedule half.schedule.safetensors",
    "ditmoe fid samples.safetensors --ref images --extractor pixels --metrics all",
    "ditmoe prune ckpt.pt --keep 0.5 | ditmoe fid --max 10",
)


def positive_distance(value: float) -> float:
    """Return a distance that may be a limit. Raises `ValueError`."""
    if not value >= 0:
        raise ValueError("give a distance of at least 0")
    return value


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
class Scoring(asked.Scoring):
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


@dataclass(frozen=True)
class ScoreFile(asked.ScoreFile):
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
    scheduling: Scheduling,
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
    guiding = beside(weaker.opened(overrides.given), stages[0])
    schedule = scheduling.of(replace(stages[0], schedule=None) if stages[0].samples else stages[0])
    running.check(schedule)
    settings = scoring.settings(compared.anyway, sampling.vae, to.force, guiding.weak)
    if scoring.statistics and scoring.limit is not None and not compared.has_reference(stages[0]):
        raise UsageError("--max: there is nothing to be near to; give --ref")
    items = Items(overrides.given, schedule)
    comparisons = [items.comparison(stage, compared, alone=scoring.statistics is not None) for stage in stages]
    spec_of = guiding.of(schedule).over(sampling.on(running.device, schedule=schedule), beside_copies=True)
    results = scores(comparisons, spec_of, settings, running, to)
    if results is None:
        return  # another rank prints
    path = str(to.output.absolute()) if to.output else ""
    if len(results) == 1:
        result = results[0].score
        emit(printing, scheduled(stages[0], schedule).done("fid", {}).to_json(result.to_json()), rows(result), path)
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


@dataclass(frozen=True)
class Items:
    """The sides of all comparisons, each opened once; `schedule` is that of the subjects, if any."""

    given: Given
    schedule: ComputeSchedule | None = None
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
        without either it is the reference. Without --ref the reference is the original, or the subject itself: without
        its schedule, if it has one, or if it may stand `alone`.
        """

        subject = stage.samples or stage.checkpoint
        if subject is None:
            raise BadInputError("stdin: the envelope names no checkpoint and no samples to score")
        original = compared.original or (stage.original if stage.piped else None)
        if stage.samples:
            note(f"scoring the images in {stage.samples}: sampling options are theirs")
        others = [self.item(stage, path, own=False) if path else None for path in (original, compared.ref)]
        scored = by_schedule(self.item(stage, subject, own=True), self.schedule)
        return compared_sides(scored, others[1], others[0], alone=alone)


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
    rows: list[Row] = [solver_row(subject), *schedule_rows(subject)] if subject else []
    for side in ("reference", "original"):
        sampling = conditions[side]["sampling"] if conditions[side] else None
        text = solver_row(sampling)[1] if sampling and subject else None
        if text is not None and text not in [told for _, told in rows]:
            rows.append((f"solver of the {side}", text))
        for name, told in schedule_rows(sampling or {}):
            rows += [] if told in [each for _, each in rows] else [(f"{name} of the {side}", told)]
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
