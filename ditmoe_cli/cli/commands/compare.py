"""``ditmoe compare``: what became of a checkpoint, measured on the same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ditmoe_cli.api import comparison_runs as asked
from ditmoe_cli.api.argument_checks import ending
from ditmoe_cli.api.comparison_runs import compared, pair_of
from ditmoe_cli.cli.guiding_options import WeakGuiding, beside
from ditmoe_cli.cli.options import Models, Overrides, Running, complete_checkpoint
from ditmoe_cli.cli.sampling_options import Scheduling, UpstreamSampling, schedule_rows, scheduled, solver_row
from ditmoe_cli.cli.stage import Stage, incoming, open_stage
from ditmoe_cli.cli.terminal import Printing, Row, columns, emit
from ditmoe_cli.errors import BadInputError, GateError, UsageError
from ditmoe_cli.files.arrays import disk_bytes
from ditmoe_cli.progress import human_bytes

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.compare import CheckpointPair, KeptComparison


MACHINE = Models
EXAMPLES = (
    "ditmoe compare ckpt.pt small.safetensors --grid pairs.png",
    "ditmoe quantize ckpt.pt --bits 4 | ditmoe compare --max-error 0.1",
    "ditmoe compare ckpt.pt ckpt.pt --schedule half.schedule.safetensors",
    "ditmoe compare ckpt.pt small.safetensors --guide-with half.safetensors --guide-scale 0.5",
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
    others: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="B...",
            autocompletion=complete_checkpoint,
            help="Checkpoints to measure. Without A and B, the result of the pipe.",
        ),
    ] = None

    def stages(self) -> list[Stage]:
        """Return for each B the stage whose original is A and whose checkpoint is B, of arguments or the envelope.

        Raises `UsageError` for one argument alone, `BadInputError` where the envelope lacks one of them.
        """
        if self.a is not None and not self.others:
            raise UsageError(f"{self.a} alone has nothing to be compared with: give A and B, or pipe in an envelope")
        others: Sequence[str | None] = self.others or (None,)
        return [self._stage(other) for other in others]

    def _stage(self, other: str | None) -> Stage:
        stage = incoming(other, self.given)
        if stage.checkpoint is None:
            raise BadInputError("stdin: the envelope names no checkpoint")
        original = stage.original if self.a is None else incoming(self.a, self.given).checkpoint
        if original is None:
            raise BadInputError("stdin: the envelope names no original to compare with; give A and B as arguments")
        return replace(stage, original=original)


@dataclass(frozen=True)
class Comparing(asked.Comparing):
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
class ComparisonFiles(asked.ComparisonFiles):
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
    force: Annotated[
        bool, typer.Option("--force", help="Replace existing outputs, and measure anew what was kept.")
    ] = False


def run(
    sampling: UpstreamSampling,
    weaker: WeakGuiding,
    scheduling: Scheduling,
    comparing: Comparing,
    running: Running,
    pair: Pair,
    to: ComparisonFiles,
    printing: Printing,
) -> None:
    """Measure how far B strays from A.

    Samples both with the same seeds and labels, and prints the error of the prediction by step along A's trajectory,
    the errors of the final latents and images, the overlap of routing, and the error that each block adds. An unchanged
    model scores exactly 0. With --schedule, B computes what that says, and A everything. Where one of both was
    distilled to other steps, final latents and images alone are compared, each at its own steps.
    """
    stages = pair.stages()
    if len(stages) > 1 and to.path:
        raise UsageError(f"{to.path}: holds one comparison, and {len(stages)} checkpoints are given")
    a = open_stage(stages[0], stages[0].original)
    schedule = scheduling.of(stages[0])
    guiding = beside(weaker.opened(pair.given), stages[0]).of(schedule)
    others = [open_stage(stage) for stage in stages]
    spec_of = guiding.over(sampling.on(running.device, schedule=schedule, beside=others[0]), beside_copies=True)
    pairs = [pair_of(a, b, spec_of, guiding, comparing, schedule) for b in others]
    results = compared(pairs, running, to.outputs)
    if len(results) == 1:
        emit(
            printing,
            scheduled(stages[0], schedule).done("compare", {}).to_json(results[0].result),
            rows(results[0].result),
            to.path,
        )
    else:
        files = [file_json(each, result) for each, result in zip(pairs, results, strict=True)]
        several = replace(stages[0], checkpoint=None)
        emit(printing, several.done("compare", {}).to_json({"files": files}), table_rows(files), to.path)
    check_limit(comparing.max_error, [result.result for result in results])


def check_limit(limit: float | None, results: Sequence[Mapping[str, Any]]) -> None:
    """Raise `GateError` where the relative error of a prediction is above the limit, or infinite."""
    for result in results if limit is not None else ():
        error, kind = result["prediction"]["relative_error"], result["prediction"]["kind"]
        if limit is not None and (error is None or error > limit):
            which = f"{result['conditions']['b']['path']}: " if len(results) > 1 else ""
            shown = "infinite" if error is None else f"{error:.4g}"
            raise GateError(f"{which}{kind} relative error {shown} is above --max-error {limit:g}")


def file_json(pair: CheckpointPair, result: KeptComparison) -> dict[str, Any]:
    """Return one of several comparisons as JSON: path, bytes and seconds of B, and what a single comparison has."""
    return {"path": str(pair.b.path), "bytes": disk_bytes(pair.b.path), "seconds": result.seconds, **result.result}


def table_rows(files: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return several comparisons as one table, a row a file."""
    lines = [("bytes", "relative error", "image mse", "quick frechet", "seconds")]
    for file in files:
        images, quick = file["images"], file["quick"]
        lines.append(
            (
                human_bytes(file["bytes"]),
                number(file["prediction"]["relative_error"] if file["prediction"] else None),
                number(images["mse"]) if images else "n/a",
                number(quick["estimate"]) if quick else "n/a",
                f"{file['seconds']:.1f}",
            )
        )
    return list(zip(["file", *(Path(file["path"]).name for file in files)], columns(lines), strict=True))


def rows(result: Mapping[str, Any]) -> list[Row]:
    """Return the comparison as a table; without steps in common, images and solvers alone."""
    if result["prediction"] is None:
        return images_rows(result)
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
        *schedule_rows(result),
        ("A", result["conditions"]["a"]["path"]),
        ("B", result["conditions"]["b"]["path"]),
    ]


def images_rows(result: Mapping[str, Any]) -> list[Row]:
    """Return the comparison of images that were sampled by different steps as a table."""
    latents, conditions = result["latents"], result["conditions"]
    return [
        ("quick score", quick_row(result["quick"])),
        ("final latents", f"relative {number(latents['relative_error'])}, mse {number(latents['mse'])}"),
        *([("final images", images_row(result["images"]))] if result["images"] else []),
        ("solver of A", solver_row(conditions["sampling"])[1]),
        ("solver of B", solver_row(conditions["sampling_b"])[1]),
        *schedule_rows(result),
        ("A", conditions["a"]["path"]),
        ("B", conditions["b"]["path"]),
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
