"""``ditmoe fid``: how far images are from a reference, and what compression did to each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ditmoe_cli.cli.options import (
    Batch,
    Cfg,
    Classes,
    Device,
    Force,
    Heads,
    Json,
    Quiet,
    SamplerOpt,
    Seed,
    SolverOpt,
    Steps,
    TopK,
    checked_device,
    given,
    require_safetensors,
)
from ditmoe_cli.cli.output import Printing, Row, emit, note, progress
from ditmoe_cli.cli.spec import sample_spec
from ditmoe_cli.cli.stage import Stage, incoming, open_stage
from ditmoe_cli.errors import BadInputError, GateError, UsageError

if TYPE_CHECKING:
    from ditmoe_cli.diffusion.sampling import SampleSpec
    from ditmoe_cli.evaluation.samples import Runtime
    from ditmoe_cli.evaluation.score import Score, Side
    from ditmoe_cli.model.checkpoint import Checkpoint
    from ditmoe_cli.model.config import Given

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
        help="inception, pixels or package.module:factory. [default: what A's metadata names, else inception]",
    ),
]
WeightsOpt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--weights", metavar="FILE", help="Inception weights. [default: the cache, else fetched once]"),
]
MaxOpt = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--max", metavar="X", help="Exit with 6 if the distance is above X."),
]
ScoreOutput = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("-o", "--output", metavar="FILE", help="Write the score as safetensors too."),
]


def run(
    subject: SubjectArg = None,
    ref: RefOpt = None,
    original: OriginalOpt = None,
    images: ImagesOpt = 2048,
    steps: Steps = 20,
    cfg: Cfg = 1.0,
    solver: SolverOpt = None,
    classes: Classes = None,
    seed: Seed = 0,
    batch: Batch = 64,
    device: Device = "cpu",
    extractor: ExtractorOpt = None,
    weights: WeightsOpt = None,
    max_value: MaxOpt = None,
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
    unchanged model scores 0. The distance is called fid over Inception features and frechet over any other.
    """
    if max_value is not None and not max_value >= 0:
        raise UsageError(f"--max {max_value}: give a distance of at least 0")
    if images < 2:
        raise UsageError(f"--images {images}: a distance needs at least 2 images")
    said = given(heads, top_k, sampler)
    stage = incoming(subject, said)
    options = Sampling(images, steps, cfg, seed, solver, classes, batch, device)
    result = measure(stage, _Asked(ref, original, extractor, weights, said), options, output, force)
    path = str(output.absolute()) if output else stage.samples or stage.checkpoint
    emit(Printing(json, quiet), stage.done("fid", {}).to_json(result.to_json()), rows(result), path)
    if max_value is not None and result.value > max_value:
        raise GateError(f"{result.metric} {result.value:.4g} is above --max {max_value:g}")


@dataclass(frozen=True)
class Sampling:
    """The sampling options."""

    images: int
    steps: int
    cfg: float
    seed: int
    solver: str | None
    classes: str | None
    batch: int
    device: str

    def spec(self, checkpoint: Checkpoint) -> SampleSpec:
        """Return the spec for a checkpoint."""
        return sample_spec(checkpoint, self.images, self.steps, self.cfg, self.seed, self.solver, self.classes)


@dataclass(frozen=True)
class _Asked:
    """The comparing options."""

    ref: str | None
    original: str | None
    extractor: str | None
    weights: Path | None
    given: Given


@dataclass(frozen=True)
class _Item:
    """Something to compare, before it is sampled or read: its path, and the checkpoint if it is one."""

    path: Path
    checkpoint: Checkpoint | None


def measure(stage: Stage, asked: _Asked, options: Sampling, output: Path | None, force: bool) -> Score:
    """Sample or read all sides and score them. Everything that can be refused is refused before sampling."""
    from ditmoe_cli.checkpoint.staging import check_target
    from ditmoe_cli.evaluation.features import check_extractor_name, make_extractor
    from ditmoe_cli.evaluation.samples import Runtime
    from ditmoe_cli.evaluation.score import card_of, check_statistics, score, write_score

    if asked.extractor is not None:
        check_extractor_name(asked.extractor)
    if output is not None:
        require_safetensors(output)
    subject = _item(stage, stage.samples or stage.checkpoint)
    reference, original = _others(stage, asked)
    inputs = [item.path for item in (subject, reference, original)]
    if output is not None:
        check_target(output.absolute(), force, inputs)
    cards = [card for item in (subject, reference) if (card := card_of(item.path, item.checkpoint))]
    name = asked.extractor or next((card.extractor for card in cards if card.extractor), "inception")
    grey_levels = cards[0].grey_levels if cards else 255
    device = str(checked_device(options.device))
    extractor = make_extractor(name, grey_levels=grey_levels, weights=asked.weights, device=device)

    def check(side: Side, other: Checkpoint) -> None:
        check_statistics(side, other, extractor, grey_levels)

    sides = _sides((subject, reference, original), options, Runtime(device, options.batch), check)
    result = score(*sides, extractor, grey_levels, progress, note)
    if output is not None:
        write_score(output, result, force, inputs)
    return result


def _item(stage: Stage, path: str | None, said: Given | None = None) -> _Item:
    from ditmoe_cli.evaluation.images import kind_of
    from ditmoe_cli.model.checkpoint import resolve_path

    if path is None:
        raise BadInputError("stdin: the envelope names no checkpoint and no samples to score")
    found = resolve_path(path)
    return _Item(found, open_stage(stage, str(found), said) if kind_of(found) == "checkpoint" else None)


def _others(stage: Stage, asked: _Asked) -> tuple[_Item, _Item]:
    """Return the reference, and the original for the paired error: what --original names, else the pipeline's, else
    the reference.
    """
    piped = stage.original if stage.history else None
    named = asked.original or piped
    if asked.ref is None and named is None:
        raise UsageError("nothing to compare with: give --ref (a checkpoint, samples, statistics or images)")
    original = _item(stage, _absolute(named), asked.given) if named else None
    reference = _item(stage, _absolute(asked.ref), asked.given) if asked.ref else original
    assert reference is not None
    return reference, original or reference


def _absolute(path: str | None) -> str | None:
    from ditmoe_cli.model.checkpoint import resolve_path

    return str(resolve_path(path).absolute()) if path else None


def _sides(
    items: tuple[_Item, _Item, _Item], options: Sampling, runtime: Runtime, check: Callable[[Side, Checkpoint], None]
) -> tuple[Side, Side, Side | None]:
    """Sample or read the sides, each thing once; the subject's own spec, where it has one, rules them all.

    What is stored is read first, and `check` may refuse it for the checkpoint on the other side, before anything is
    sampled. The original is None where it was not made with the subject's seeds, since nothing pairs then.
    """
    from ditmoe_cli.evaluation.score import sampled_side, stored_side

    done = {item.path: stored_side(item.path) for item in items if item.checkpoint is None}
    for item, other in (items[:2], items[1::-1]):
        if item.path in done and other.checkpoint is not None:
            check(done[item.path], other.checkpoint)

    def side(item: _Item, spec: SampleSpec | None) -> Side:
        if item.path not in done:
            assert item.checkpoint is not None
            chosen = _followed(spec, item.checkpoint) if spec else options.spec(item.checkpoint)
            done[item.path] = sampled_side(item.checkpoint, chosen, runtime, progress)
        return done[item.path]

    subject = side(items[0], None)
    reference = side(items[1], subject.spec)
    if subject.spec is None:
        return subject, reference, None
    original = side(items[2], subject.spec)
    return subject, reference, original if original.spec == subject.spec else None


def _followed(spec: SampleSpec, checkpoint: Checkpoint) -> SampleSpec:
    """Return the subject's spec, or raise `BadInputError` where another checkpoint cannot be sampled by it."""
    from ditmoe_cli.diffusion.sampling import check_spec
    from ditmoe_cli.diffusion.solvers import choose_solver

    try:
        choose_solver(spec.solver, checkpoint.config.sampler)
        return check_spec(spec, checkpoint.config.num_classes)
    except UsageError as error:
        raise BadInputError(f"{checkpoint.path}: cannot be sampled as the other side is: {error}") from None


def rows(result: Score) -> list[Row]:
    """Return the score as a table."""
    paired = result.paired
    extractor = result.conditions["extractor"]["name"]
    error = (
        f"mse {paired.mse:.4g} over {paired.n} pairs" if paired else "none: no images of the same seeds to pair with"
    )
    psnr = f", psnr {paired.psnr:.2f} dB" if paired and paired.psnr is not None else ""
    return [
        (result.metric, f"{result.value:.4f}"),
        ("images", f"{result.images} against {result.reference_images}"),
        ("paired error", error + psnr),
        ("extractor", extractor),
        ("subject", result.conditions["subject"]["path"]),
        ("reference", result.conditions["reference"]["path"]),
    ]
