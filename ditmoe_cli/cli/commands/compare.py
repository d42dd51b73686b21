"""``ditmoe compare``: what became of a checkpoint, measured on the same seeds."""

from __future__ import annotations

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
    Json,
    Quiet,
    SamplerOpt,
    Seed,
    StepsOpt,
    TopK,
    UpstreamExact,
    checked_device,
    given,
    require_safetensors,
)
from ditmoe_cli.cli.sampling import SamplingOptions, sample_spec, solver_row
from ditmoe_cli.cli.stage import Stage, incoming, open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit, progress
from ditmoe_cli.errors import BadInputError, GateError, UsageError

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.compare import Divergence
    from ditmoe_cli.model.config import Given

FirstArg = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(metavar="A", help="The checkpoint to measure from; without A and B the envelope's original."),
]
SecondArg = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(metavar="B", help="The checkpoint to measure; without A and B the envelope's own."),
]
Images = Annotated[int, typer.Option("--images", metavar="N", help="Images to sample of each checkpoint.")]
FollowedSolver = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--solver",
        metavar="NAME",
        help="euler, ab2, ab4 or dpmpp-2m for rf; ddim, ddpm or dpmpp-2m for ddpm. [default: ab2; ddim]",
    ),
]
Bins = Annotated[int, typer.Option("--bins", metavar="N", help="Step bins, from noise to image.")]
MaxError = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--max-error", metavar="X", help="Exit with 6 if the prediction's relative error is above X."),
]
Grid = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--grid", metavar="FILE", help="PNG to draw the first 64 pairs of images in, A left, B right."),
]
NumbersOutput = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("-o", "--output", metavar="FILE", help="Write the numbers as safetensors too."),
]


def run(
    first: FirstArg = None,
    second: SecondArg = None,
    images: Images = 64,
    steps: StepsOpt = None,
    cfg: Cfg = 1.0,
    solver: FollowedSolver = None,
    upstream: UpstreamExact = False,
    bins: Bins = 10,
    classes: Classes = None,
    seed: Seed = 0,
    batch: Batch = 64,
    device: Device = "cpu",
    max_error: MaxError = None,
    grid: Grid = None,
    heads: Heads = None,
    top_k: TopK = None,
    sampler: SamplerOpt = None,
    output: NumbersOutput = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how far B strays from A.

    Same seeds, same labels: errors of the prediction by step along A's trajectory, errors of the final latents and
    images, routing overlap, and where in depth the error is born. An unchanged model scores exactly 0.
    """
    stage = both(first, second, given(heads, top_k, sampler))
    check_values(max_error, grid, output)
    a, b = open_stage(stage, stage.original), open_stage(stage)
    spec = sample_spec(a, SamplingOptions(images, steps, cfg, seed, solver, classes, upstream=upstream))
    from ditmoe_cli.evaluation.compare import Outputs, diverge
    from ditmoe_cli.evaluation.samples import Runtime

    runtime, outputs = Runtime(checked_device(device), batch), Outputs(output, grid, force)
    found = diverge(a, b, spec, bins, runtime, outputs, progress)
    document, made = stage.done("compare", {}).to_json(found.to_json()), output or grid
    emit(Printing(json, quiet), document, rows(found), str(made.absolute()) if made else "")
    if max_error is not None and not found.relative_error <= max_error:
        raise GateError(f"{found.kind} relative error {found.relative_error:.4g} is above --max-error {max_error:g}")


def both(first: str | None, second: str | None, said: Given) -> Stage:
    """Return the stage whose original is A and whose checkpoint is B: of two arguments, else of the envelope on stdin.

    Raises `UsageError` for one argument alone, `BadInputError` where the envelope lacks one of them.
    """
    if first is not None and second is None:
        raise UsageError(f"{first} alone has nothing to be compared with: give A and B, or pipe in an envelope")
    stage = incoming(second, said)
    if stage.checkpoint is None:
        raise BadInputError("stdin: the envelope names no checkpoint")
    original = stage.original if first is None else incoming(first, said).checkpoint
    if original is None:
        raise BadInputError("stdin: the envelope names no original to compare with; give A and B as arguments")
    return replace(stage, original=original)


def check_values(max_error: float | None, grid: Path | None, output: Path | None) -> None:
    """Raise `UsageError` for option values that are wrong whatever is compared."""
    if max_error is not None and not max_error >= 0:
        raise UsageError(f"--max-error {max_error}: give a relative error of at least 0")
    if grid is not None and grid.suffix != ".png":
        raise UsageError(f"--grid {grid}: give a name that ends in .png")
    if output is not None:
        require_safetensors(output)


def rows(found: Divergence) -> list[Row]:
    """Return the comparison as a table."""
    result = found.to_json()
    prediction, latents, depth, routing = (result[name] for name in ("prediction", "latents", "depth", "routing"))
    kind = prediction["kind"]
    blocks = zip(depth["added"], depth["cumulative"], routing["blocks"]["overlap"], strict=True)
    return [
        (f"{kind} error", f"relative {number(prediction['relative_error'])}, mse {number(prediction['mse'])}"),
        ("by step bin", " ".join(number(value) for value in prediction["bins"]["relative_error"])),
        ("quick score", quick_row(result["quick"])),
        ("final latents", f"relative {number(latents['relative_error'])}, mse {number(latents['mse'])}"),
        *([("final images", images_row(result["images"]))] if result["images"] else []),
        ("routing overlap", number(routing["overlap"]) + (f" ({routing['note']})" if routing["note"] else "")),
        *(
            (f"block {i}", f"adds {number(alone)}, cumulative {number(sofar)}, overlap {number(share)}")
            for i, (alone, sofar, share) in enumerate(blocks)
        ),
        solver_row(result["conditions"]["sampling"]),
        ("A", result["conditions"]["a"]["path"]),
        ("B", result["conditions"]["b"]["path"]),
    ]


def number(value: float | None) -> str:
    """Return a number in four digits; what is unknown or infinite is told so."""
    return "n/a" if value is None else f"{value:.4g}"


def quick_row(quick: dict[str, Any] | None) -> str:
    """Return the distance of images of the same seeds with its interval: what ranks compressed models by few images."""
    if quick is None:
        return "n/a: an interval takes at least 2 images"
    interval = f"{100 * quick['level']:g} % interval {number(quick['low'])} to {number(quick['high'])}"
    return f"frechet {number(quick['estimate'])} ({interval})"


def images_row(images: dict[str, Any]) -> str:
    """Return the errors of images in one line."""
    psnr = "equal" if images["psnr"] is None else f"psnr {images['psnr']:.2f} dB"
    return f"mse {images['mse']:.4g}, {psnr}, ssim {images['ssim']:.4f} over {images['n']} pairs"
