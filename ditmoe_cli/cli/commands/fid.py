"""``ditmoe fid``: how far images are from a reference, and what compression did to each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ditmoe_cli.cli.groups import completing, ending, one_of
from ditmoe_cli.cli.options import Overrides, Running, complete_checkpoint
from ditmoe_cli.cli.sampling_options import ImageSampling, solver_row
from ditmoe_cli.cli.stage import Stage, incoming, open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit, note
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import BadInputError, GateError, UsageError
from ditmoe_cli.evaluation.images import kind_of
from ditmoe_cli.evaluation.scores.conventions import CONVENTIONS, PRECISIONS
from ditmoe_cli.evaluation.scores.metrics import DEFAULT_CONVENTION, Request, parse_scores
from ditmoe_cli.files.cache import find_cache
from ditmoe_cli.files.staging import check_target
from ditmoe_cli.model.checkpoint import Checkpoint, resolve_path
from ditmoe_cli.model.config import Given

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.fid import FidSettings
    from ditmoe_cli.evaluation.fid_score import Score
    from ditmoe_cli.evaluation.fid_sides import Comparison, Item
    from ditmoe_cli.evaluation.scores.intervals import Interval
    from ditmoe_cli.evaluation.worker import Runtime


EXAMPLES = (
    "ditmoe fid small.safetensors --ref ckpt.pt",
    "ditmoe fid samples.safetensors --ref images --extractor pixels --metrics all",
    "ditmoe prune ckpt.pt --keep 0.5 | ditmoe fid --max 10",
)


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
    return count


@dataclass(frozen=True)
class Compared:
    """The subject, and what it is compared with."""

    panel: ClassVar[str] = "Comparing"

    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="A",
            autocompletion=complete_checkpoint,
            help="Checkpoint, samples, statistics or images to score. Without it, the result of the pipe.",
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

    def stage(self, given: Given) -> Stage:
        """Return the stage of the subject, with its path under `samples` where A names images and no checkpoint."""
        stage = incoming(self.subject, given, shared=True)
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
    force: Annotated[bool, typer.Option("--force", help="Replace existing outputs.")] = False


def run(
    compared: Compared,
    sampling: Images,
    running: Running,
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
    stage = compared.stage(overrides.given)
    check_outputs(scoring, to)
    settings = scoring.settings(compared.anyway, sampling.vae, to.force)
    if scoring.statistics and scoring.limit is not None and not compared.has_reference(stage):
        raise UsageError("--max: there is nothing to be near to; give --ref")
    runtime, comparison = (
        running.runtime,
        comparison_of(stage, compared, overrides.given, alone=scoring.statistics is not None),
    )
    result = score(comparison, sampling.spec, settings, runtime, to)
    if result is None:
        return  # another rank prints
    document = stage.done("fid", {}).to_json(result.to_json())
    emit(printing, document, rows(result), str(to.output.absolute()) if to.output else "")
    if scoring.limit is not None and result.value > scoring.limit:
        raise GateError(f"{result.metric} {result.value:.4g} is above --max {scoring.limit:g}")


def check_outputs(scoring: Scoring, to: ScoreFile) -> None:
    """Raise `UsageError` where score and statistics would be written to one file."""
    if scoring.statistics and to.output and scoring.statistics.resolve() == to.output.resolve():
        raise UsageError(f"{scoring.statistics}: named twice; give each output a name of its own")


def score(
    comparison: Comparison,
    spec_of: Callable[[Checkpoint], SampleSpec],
    settings: FidSettings,
    runtime: Runtime,
    to: ScoreFile,
) -> Score | None:
    """Compare, and write the score where that was asked for; outputs are refused before anything is sampled."""
    from ditmoe_cli.evaluation.fid import measure_distance
    from ditmoe_cli.evaluation.fid_score import write_score

    inputs = [item.path for item in comparison.items] + ([settings.weights] if settings.weights else [])
    inputs += [Path(settings.vae).expanduser()] if settings.vae else []
    for target in (to.output, settings.statistics):
        if target is not None:
            check_target(target.absolute(), to.force, inputs)
    if settings.work is None and (problem := find_cache().problem):
        note(problem)
    result = measure_distance(comparison, spec_of, settings, runtime, note)
    if to.output is not None and result is not None:
        write_score(to.output, result, to.force, inputs)
    return result


def comparison_of(stage: Stage, compared: Compared, given: Given, alone: bool = False) -> Comparison:
    """Return what is compared with what.

    The subject is the stage's samples or checkpoint. The original is what --original names, else a pipeline's; without
    either it is the reference. Without --ref the reference is the original, or the subject itself if that may stand
    `alone`.
    """
    from ditmoe_cli.evaluation.fid_sides import Comparison, Item

    def item(path: str, overrides: Given | None) -> Item:
        file = resolve_path(path).absolute()
        return Item(file, open_stage(stage, str(file), overrides) if kind_of(file) == "checkpoint" else None)

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
    scored = item(subject, None)
    first = item(original, given) if original else None
    reference = item(ref, given) if ref else first
    assert reference is not None
    return Comparison(scored, reference, first or reference)


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
        *([solver_row(sampling)] if (sampling := result.conditions["subject"]["sampling"]) else []),
        ("extractor", extractor),
        ("subject", result.conditions["subject"]["path"]),
        ("reference", result.conditions["reference"]["path"]),
    ]


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
