"""``ditmoe report sensitivity``: which parts of which blocks predictions need at which steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api import sensitivity_runs as asked
from ditmoe_cli.api.argument_checks import at_least, ending
from ditmoe_cli.api.foretelling import estimate_row
from ditmoe_cli.api.sensitivity_runs import foreseen_map, parse_parts, sensitivity_of
from ditmoe_cli.cli.groups import completing
from ditmoe_cli.cli.options import Models, Running, Source
from ditmoe_cli.cli.sampling_options import UpstreamSampling, parse_classes, solver_row
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing, Row, columns, emit
from ditmoe_cli.routing.sensitivity.sensitivity_map import PARTS, SensitivityMap

MACHINE = Models
EXAMPLES = (
    "ditmoe report sensitivity ckpt.pt --cfg 1.5 -o ckpt.sensitivity.json --png ckpt.sensitivity.png",
    "ditmoe report profile ckpt.profile.safetensors --sensitivity ckpt.sensitivity.json -o report.html",
    "ditmoe quantize ckpt.pt --bits 4 | ditmoe report sensitivity",
)
_MOST_COLUMNS = 10  # of step bins that a table shows


@dataclass(frozen=True)
class MappedSampling(asked.MappedSampling, UpstreamSampling):
    """How the states of a map are sampled."""

    images: Annotated[int, typer.Option("--images", metavar="N", help="Images to sample.")] = 16
    classes: Annotated[
        tuple[int, ...] | None,
        typer.Option(
            "--classes",
            metavar="LIST",
            parser=parse_classes,
            help="Labels to cycle through, as 0,3,7 or 0-3,7. [default: all, or as many as images, evenly spread]",
        ),
    ] = None


@dataclass(frozen=True)
class LeavingOut(asked.LeavingOut):
    """Which parts are left out, and the step bins of their errors."""

    panel: ClassVar[str] = "Map"

    parts: Annotated[
        tuple[str, ...],
        typer.Option(
            "--parts",
            metavar="LIST",
            parser=parse_parts,
            autocompletion=completing(*PARTS),
            help=f"What to leave out of a block: some of {', '.join(PARTS)}. [default: each of them]",
        ),
    ] = tuple(PARTS)
    bins: Annotated[
        int | None,
        typer.Option(
            "--bins",
            metavar="N",
            help="Bins of steps, from noise to image; each image is measured at one step of each bin. [default: one "
            "for each step, at most 50]",
        ),
    ] = None


@dataclass(frozen=True)
class Measuring(Running):
    """Where the model runs, and on how many images at a time."""

    batch: Annotated[
        int,
        typer.Option(
            "--batch",
            metavar="N",
            callback=at_least(1),
            help="Images at a time, of which all parts are left out at once; rounding may depend on it.",
        ),
    ] = 8


@dataclass(frozen=True)
class MapFiles(asked.MapFiles):
    """Where a map goes."""

    panel: ClassVar[str] = "Output"

    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", callback=ending(".json"), help="FILE.json to write the map to."),
    ] = None
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="FILE", callback=ending(".png"), help="FILE.png to draw the map in."),
    ] = None
    force: Annotated[
        bool, typer.Option("--force", help="Replace existing outputs, and measure anew what was kept.")
    ] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what measuring takes, and measure nothing.")] = False


def run(
    sampling: MappedSampling,
    leaving: LeavingOut,
    running: Measuring,
    source: Source,
    to: MapFiles,
    printing: Printing,
) -> None:
    """Map the error of predictions without a part of a block, by block and step.

    At states of the checkpoint's own sampling, one block at a time does without itself, its attention, its mixture,
    its slot 2 or its shared expert, in both branches of guidance. Prints Σ‖v - v'‖² / Σ‖v‖² of guided predictions.
    Measured once: the same map is kept from an earlier run.
    """
    stage = source.stage()
    checkpoint = open_stage(stage)
    if to.dry_run:
        foreseen = foreseen_map(checkpoint, sampling, leaving, running)
        rows_told = [solver_row(foreseen.sampling), estimate_row(foreseen.estimates, foreseen.rate)]
        emit(printing, stage.to_json(foreseen.to_json()), rows_told, "")
        return
    spec = sampling.on(running.device)(checkpoint)
    found = sensitivity_of(checkpoint, spec, leaving, running, to)
    done = stage.done("report sensitivity", {**spec.conditions(), "bins": found.bins, "parts": list(leaving.parts)})
    emit(printing, done.to_json({**found.to_json(), **to.to_json()}), rows(found), to.path)


def rows(found: SensitivityMap) -> list[Row]:
    """Return a map as tables: errors over all steps, then by step bin for each part; many bins are taken together."""
    names = [f"without {PARTS[part]}" for part in found.errors]
    lines = [names, *zip(*([number(e) for e in found.by_block(part)] for part in found.errors), strict=True)]
    blocks = [f"block {block}" for block in range(found.blocks)]
    told: list[Row] = list(zip(["all steps", *blocks], columns(lines), strict=True))
    groups = min(_MOST_COLUMNS, found.bins)
    for part, name in zip(found.errors, names, strict=True):
        table = found.grouped(part, groups)
        lines = [
            [f"bin {index}" for index in range(groups)],
            *([number(e) for e in row] for row in zip(*table, strict=True)),
        ]
        told += zip([name, *blocks], columns(lines), strict=True)
    return [*told, solver_row(found.sampling)]


def number(error: float) -> str:
    """Return an error in two digits."""
    return f"{error:.2g}"
