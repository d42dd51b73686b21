"""``ditmoe compare``: what became of a checkpoint, measured on the same seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ditmoe_cli.cli.foretelling import foretell
from ditmoe_cli.cli.groups import ending
from ditmoe_cli.cli.options import Overrides, Running, complete_checkpoint
from ditmoe_cli.cli.sampling_options import UpstreamSampling, solver_row
from ditmoe_cli.cli.stage import Stage, incoming, open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit
from ditmoe_cli.diffusion.sampling import choose_bins
from ditmoe_cli.errors import BadInputError, GateError, UsageError
from ditmoe_cli.model.effort import sampling_estimate

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.compare import Divergence, Outputs


EXAMPLES = (
    "ditmoe compare ckpt.pt small.safetensors --grid pairs.png",
    "ditmoe quantize ckpt.pt --bits 4 | ditmoe compare --max-error 0.1",
)


def positive_error(value: float) -> float:
    """Return an error that may be a limit. Raises `ValueError`."""
    if not value >= 0:
        raise ValueError("give a relative error of at least 0")
    return value


@dataclass(frozen=True)
class Pair(Overrides):
    """The two checkpoints to compare."""

    a: Annotated[
        str | None,
        typer.Argument(
            metavar="A",
            autocompletion=complete_checkpoint,
            help="Checkpoint to measure from. Without A and B, the original of the pipe.",
        ),
    ] = None
    b: Annotated[
        str | None,
        typer.Argument(
            metavar="B",
            autocompletion=complete_checkpoint,
            help="Checkpoint to measure. Without A and B, the result of the pipe.",
        ),
    ] = None

    def stage(self) -> Stage:
        """Return the stage whose original is A and whose checkpoint is B: of two arguments, else of the envelope.

        Raises `UsageError` for one argument alone, `BadInputError` where the envelope lacks one of them.
        """
        if self.a is not None and self.b is None:
            raise UsageError(f"{self.a} alone has nothing to be compared with: give A and B, or pipe in an envelope")
        stage = incoming(self.b, self.given)
        if stage.checkpoint is None:
            raise BadInputError("stdin: the envelope names no checkpoint")
        original = stage.original if self.a is None else incoming(self.a, self.given).checkpoint
        if original is None:
            raise BadInputError("stdin: the envelope names no original to compare with; give A and B as arguments")
        return replace(stage, original=original)


@dataclass(frozen=True)
class Comparing:
    """Step bins of the measured errors, and the largest error allowed."""

    panel: ClassVar[str] = "Comparing"

    bins: Annotated[
        int | None,
        typer.Option(
            "--bins",
            metavar="N",
            help="Bins of steps, from noise to image. [default: 10, or a bin a step where these are fewer]",
        ),
    ] = None
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error",
            metavar="X",
            callback=positive_error,
            help="Exit with code 6 if the relative error of the prediction is above X.",
        ),
    ] = None


@dataclass(frozen=True)
class ComparisonFiles:
    """The files that a comparison writes, each where it is asked for."""

    panel: ClassVar[str] = "Output"

    grid: Annotated[
        Path | None,
        typer.Option(
            "--grid",
            metavar="FILE",
            callback=ending(".png"),
            help="PNG to draw the first 64 pairs of images in, A left, B right.",
        ),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            callback=ending(".safetensors"),
            help="FILE.safetensors to write the numbers to.",
        ),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace existing outputs.")] = False

    @property
    def outputs(self) -> Outputs:
        """The same as the comparison takes them."""
        from ditmoe_cli.evaluation.compare import Outputs

        return Outputs(self.output, self.grid, self.force)

    @property
    def path(self) -> str:
        """The absolute path that ``-q`` prints."""
        written = self.output or self.grid
        return str(written.absolute()) if written else ""


def run(
    sampling: UpstreamSampling,
    comparing: Comparing,
    running: Running,
    pair: Pair,
    to: ComparisonFiles,
    printing: Printing,
) -> None:
    """Measure how far B strays from A.

    Samples both with the same seeds and labels, and prints the error of the prediction by step along A's trajectory,
    the errors of the final latents and images, the overlap of routing, and the error that each block adds. An unchanged
    model scores exactly 0.
    """
    stage = pair.stage()
    a, b = open_stage(stage, stage.original), open_stage(stage)
    spec = sampling.spec(a)
    from ditmoe_cli.evaluation.compare import CheckpointPair, compare_checkpoints

    checkpoints = CheckpointPair(a, b, spec, choose_bins(comparing.bins, spec.steps))
    runtime = running.runtime
    both = [sampling_estimate(each.config, spec.images, spec.nfe, runtime.batch) for each in (a, b)]
    foretell(both, lambda: runtime.device)
    result = compare_checkpoints(checkpoints, runtime, to.outputs)
    emit(printing, stage.done("compare", {}).to_json(result.to_json()), rows(result), to.path)
    limit = comparing.max_error
    if limit is not None and not result.relative_error <= limit:
        raise GateError(f"{result.kind} relative error {result.relative_error:.4g} is above --max-error {limit:g}")


def rows(divergence: Divergence) -> list[Row]:
    """Return the comparison as a table."""
    result = divergence.to_json()
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
    """Return a number in four digits, or n/a where it is unknown or infinite."""
    return "n/a" if value is None else f"{value:.4g}"


def quick_row(quick: dict[str, Any] | None) -> str:
    """Return the Fréchet distance of images of the same seeds with its interval; it ranks models by few images."""
    if quick is None:
        return "n/a: an interval takes at least 2 images"
    interval = f"{100 * quick['level']:g} % interval {number(quick['low'])} to {number(quick['high'])}"
    return f"frechet {number(quick['estimate'])} ({interval})"


def images_row(images: dict[str, Any]) -> str:
    """Return the errors of images in one line."""
    psnr = "equal" if images["psnr"] is None else f"psnr {images['psnr']:.2f} dB"
    return f"mse {images['mse']:.4g}, {psnr}, ssim {images['ssim']:.4f} over {images['n']} pairs"
