"""``ditmoe fid``: how far images are from a reference, and what compression did to each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ditmoe_cli.cli.options import (
    Batch,
    Cfg,
    Classes,
    Device,
    Force,
    Heads,
    IntervalOpt,
    Json,
    Quiet,
    SamplerOpt,
    Seed,
    SolverOpt,
    StepsOpt,
    TopK,
    UpstreamExact,
    VaeOpt,
    checked_device,
    given,
    require_safetensors,
)
from ditmoe_cli.cli.sampling import SamplingOptions, sample_spec, solver_row
from ditmoe_cli.cli.stage import Stage, incoming, open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit, note, progress
from ditmoe_cli.errors import BadInputError, GateError, UsageError
from ditmoe_cli.evaluation.scores.requested import DEFAULT_CONVENTION

if TYPE_CHECKING:
    from ditmoe_cli.diffusion.sampling import SampleSpec
    from ditmoe_cli.evaluation.fid import Comparison, Measure
    from ditmoe_cli.evaluation.fid_score import Score
    from ditmoe_cli.evaluation.samples import Runtime
    from ditmoe_cli.evaluation.scores.intervals import Interval
    from ditmoe_cli.evaluation.scores.requested import Request
    from ditmoe_cli.model.config import Given
    from ditmoe_cli.model.opened import Checkpoint

SubjectArg = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(metavar="A", help="A checkpoint, samples, statistics or images; else the envelope on stdin."),
]
RefOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--ref", metavar="B", help="What to compare with: as A. [default: the original's samples of the same seeds]"
    ),
]
OriginalOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--original",
        metavar="C",
        help="What the paired error is against. [default: the pipeline's original, else --ref]",
    ),
]
ImagesOpt = Annotated[int, typer.Option("--images", metavar="N", help="Images to sample of each checkpoint.")]
ExtractorOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--extractor",
        metavar="NAME",
        help="inception, pixels or package.module:factory. [default: what A's or B's metadata name, else inception]",
    ),
]
WeightsOpt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--weights", metavar="FILE", help="Inception weights. [default: the cache, else fetched once]"),
]
PrecisionOpt = Annotated[
    str, typer.Option("--precision", metavar="fp32|bf16", help="Of Inception; bf16 is faster and less exact.")
]
ConventionOpt = Annotated[
    str,
    typer.Option(
        "--convention",
        metavar="NAME",
        help="Whose resizing and scores: adm, torch-fidelity, pytorch-fid or clean-fid.",
    ),
]
MetricsOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--metrics", metavar="LIST", help="Scores besides: sfid, is, pr, kid, fid-inf, or all."),
]
BootstrapOpt = Annotated[
    int, typer.Option("--bootstrap", metavar="N", help="Resamples for an interval of the distance; 0 for none.")
]
WorkOpt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--work", metavar="DIR", help="Where images and features stay until the score is done. [default: the cache]"
    ),
]
StatisticsOpt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--save-statistics",
        metavar="FILE",
        help="Write A's statistics as npz or safetensors; without B A is compared with itself.",
    ),
]
MaxOpt = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--max", metavar="X", help="Exit with 6 if the distance is above X."),
]
Anyway = Annotated[bool, typer.Option("--anyway", help="Compare samples that were made under other settings.")]
ScoreOutput = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("-o", "--output", metavar="FILE", help="Write the score as safetensors too."),
]


def run(
    subject: SubjectArg = None,
    ref: RefOpt = None,
    original: OriginalOpt = None,
    images: ImagesOpt = 2048,
    steps: StepsOpt = None,
    cfg: Cfg = 1.0,
    interval: IntervalOpt = None,
    solver: SolverOpt = None,
    upstream: UpstreamExact = False,
    classes: Classes = None,
    seed: Seed = 0,
    batch: Batch = 64,
    device: Device = "cpu",
    vae: VaeOpt = None,
    extractor: ExtractorOpt = None,
    weights: WeightsOpt = None,
    precision: PrecisionOpt = "fp32",
    convention: ConventionOpt = DEFAULT_CONVENTION,
    metrics: MetricsOpt = None,
    resamples: BootstrapOpt = 0,
    work: WorkOpt = None,
    statistics: StatisticsOpt = None,
    max_value: MaxOpt = None,
    anyway: Anyway = False,
    heads: Heads = None,
    top_k: TopK = None,
    sampler: SamplerOpt = None,
    output: ScoreOutput = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score samples against a reference.

    Samples A, and prints its Fréchet distance to B and its paired same-seed error against the original.

    In a pipeline without --ref the original's own samples of the same seeds are the reference, so that an
    unchanged model scores 0. The distance is called fid over Inception features and frechet over any other. A run that
    was cut off is gone on with by the same command; torchrun shares the work.
    """
    said = given(heads, top_k, sampler)
    stage = named_for_what_it_is(incoming(subject, said, shared=True))
    check_values(images, max_value, extractor, output, batch, statistics)
    request = asked_for(metrics, convention, resamples, precision)
    from ditmoe_cli.evaluation.fid import Measure
    from ditmoe_cli.evaluation.samples import Runtime

    options = SamplingOptions(images, steps, cfg, seed, solver, classes, interval, upstream)
    if statistics and max_value is not None and not (ref or original or stage.piped):
        raise UsageError("--max: there is nothing to be near to; give --ref")
    folder = work.absolute() if work else None
    measure = Measure(extractor, weights, anyway, request, precision, vae, folder, statistics, force)
    runtime, compared = Runtime(checked_device(device), batch), comparison(stage, ref, original, said, bool(statistics))
    result = measured(compared, lambda checkpoint: sample_spec(checkpoint, options), measure, runtime, output, force)
    if result is None:
        return  # another rank prints
    done, path = stage.done("fid", {}), str(output.absolute()) if output else ""
    emit(Printing(json, quiet), done.to_json(result.to_json()), rows(result), path)
    if max_value is not None and result.value > max_value:
        raise GateError(f"{result.metric} {result.value:.4g} is above --max {max_value:g}")


def named_for_what_it_is(stage: Stage) -> Stage:
    """Return the stage with its path under `samples` where an argument named images instead of a checkpoint."""
    from ditmoe_cli.evaluation.images import kind_of

    if stage.piped or stage.checkpoint is None or kind_of(Path(stage.checkpoint)) != "images":
        return stage
    return replace(stage, samples=stage.checkpoint, checkpoint=None, original=None)


def asked_for(metrics: str | None, convention: str, resamples: int, precision: str) -> Request:
    """Return the scores that are asked for. Raises `UsageError` for names and numbers that cannot be."""
    from ditmoe_cli.evaluation.scores.conventions import PRECISIONS
    from ditmoe_cli.evaluation.scores.requested import Request, parse_scores

    if resamples < 0 or resamples == 1:
        raise UsageError(f"--bootstrap {resamples}: give at least 2 resamples, or 0 for none")
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision}: choose {' or '.join(PRECISIONS)}")
    return Request(parse_scores(metrics, convention), convention, resamples)


def check_values(
    images: int,
    max_value: float | None,
    extractor: str | None,
    output: Path | None,
    batch: int,
    statistics: Path | None,
) -> None:
    """Raise `UsageError` for option values that are wrong whatever is scored."""
    from ditmoe_cli.evaluation.features.extractors import check_extractor_name

    if max_value is not None and not max_value >= 0:
        raise UsageError(f"--max {max_value}: give a distance of at least 0")
    if images < 2:
        raise UsageError(f"--images {images}: a distance needs at least 2 images")
    if batch < 1:
        raise UsageError(f"--batch {batch}: must be at least 1")
    if extractor is not None:
        check_extractor_name(extractor)
    if output is not None:
        require_safetensors(output)
    if statistics is not None and output is not None and statistics.resolve() == output.resolve():
        raise UsageError(f"{statistics}: named twice; give each output a name of its own")
    if statistics is not None and statistics.suffix not in (".safetensors", ".npz"):
        raise UsageError(f"--save-statistics {statistics}: give a name that ends in .safetensors or .npz")


def measured(
    compared: Comparison,
    spec_of: Callable[[Checkpoint], SampleSpec],
    measure: Measure,
    runtime: Runtime,
    output: Path | None,
    force: bool,
) -> Score | None:
    """Compare, and write the score where that was asked for; the output is refused before anything is sampled."""
    from ditmoe_cli.evaluation.fid import compare
    from ditmoe_cli.evaluation.fid_score import write_score
    from ditmoe_cli.files.staging import check_target

    inputs = [item.path for item in compared.items] + ([measure.weights] if measure.weights else [])
    inputs += [Path(measure.vae).expanduser()] if measure.vae else []
    for target in (output, measure.statistics):
        if target is not None:
            check_target(target.absolute(), force, inputs)
    result = compare(compared, spec_of, measure, runtime, progress, note)
    if output is not None and result is not None:
        write_score(output, result, force, inputs)
    return result


def comparison(stage: Stage, ref: str | None, original: str | None, said: Given, alone: bool = False) -> Comparison:
    """Return what is compared with what.

    The subject is the stage's samples or checkpoint. The original is what --original names, else a pipeline's; without
    either it is the reference. Without --ref the reference is the original; one that may stand `alone` is its own.
    """
    from ditmoe_cli.evaluation.fid import Comparison, Item
    from ditmoe_cli.evaluation.images import kind_of
    from ditmoe_cli.model.opened import resolve_path

    def item(path: str, own: Given | None) -> Item:
        found = resolve_path(path).absolute()
        return Item(found, open_stage(stage, str(found), own) if kind_of(found) == "checkpoint" else None)

    named = original or (stage.original if stage.piped else None)
    chosen = stage.samples or stage.checkpoint
    if chosen is None:
        raise BadInputError("stdin: the envelope names no checkpoint and no samples to score")
    if ref is None and named is None and alone:
        ref = chosen
    if ref is None and named is None:
        raise UsageError("nothing to compare with: give --ref (a checkpoint, samples, statistics or images)")
    if stage.samples:
        note(f"scoring the images in {stage.samples}: sampling options are theirs")
    subject = item(chosen, None)
    first = item(named, said) if named else None
    reference = item(ref, said) if ref else first
    assert reference is not None
    return Comparison(subject, reference, first or reference)


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


def interval_row(found: Interval | None) -> str:
    """Return an interval for reading behind its value."""
    return "" if found is None else f" ({100 * found.level:g} % interval {found.low:.4g} to {found.high:.4g})"


def score_rows(scores: Mapping[str, Any]) -> list[Row]:
    """Return scores beside the distance."""
    found: list[Row] = []
    for name, value in scores.items():
        if not isinstance(value, dict):
            found.append((name, f"{value:.4f}"))
        elif "intercept" in value:
            found.append((name, f"{value['intercept']:.4f}, slope {value['slope']:.4g} / N"))
        else:
            found.append((name, f"{value['mean']:.4f} ± {value['deviation']:.4f}"))
    return found
