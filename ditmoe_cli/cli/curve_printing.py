"""``ditmoe compress --curve``: sizes against damage as a table and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ditmoe_cli.api.argument_checks import refuse_idle
from ditmoe_cli.api.curve_runs import CurveFiles, measured_curve
from ditmoe_cli.api.step_texts import number
from ditmoe_cli.cli.calibration_options import AutomaticProfile
from ditmoe_cli.cli.options import Destination, Measuring, Source
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing, Row, columns, emit
from ditmoe_cli.compression.joint.size_curve import CurvePoint, Curving, SizeCurve
from ditmoe_cli.progress import human_bytes


@dataclass(frozen=True)
class CurveOutput:
    """Where the picture goes, if there is to be one, and how the result is printed."""

    png: Path | None
    to: Destination
    printing: Printing


def run_curve(
    curving: Curving, measuring: Measuring, automatic: AutomaticProfile, source: Source, output: CurveOutput
) -> None:
    """Measure the source's curve of sizes, draw and print it; the pipe goes on with the checkpoint as it is."""
    to, png = output.to, output.png
    refuse_idle(to, "with --curve, which writes no checkpoint", "output", "dry_run", "max_shard_size")
    if png is None:
        refuse_idle(to, "with --curve and no --png", "force")
    stage = source.stage()
    checkpoint = open_stage(stage)
    beside = to.at(checkpoint.path, "curve").path
    wanted = automatic.request(stage, checkpoint, measuring, beside.parent)
    found = measured_curve(curving, checkpoint, wanted, measuring.device, beside, CurveFiles(png, to.force))
    onward = replace(stage, profile=str(found.profile.absolute()))
    path = str(png.absolute()) if png is not None else None
    emit(output.printing, onward.to_json(found.to_json()), rows(found.curve, png), path)


def rows(curve: SizeCurve, png: Path | None = None) -> list[Row]:
    """Return the curve as a table: sizes, the share of the file and of neurons that stay, errors, memory, marks."""
    heads = ("bytes", "of the file", "neurons", "predicted error", "expected error", "on a GPU", "")
    cells = [
        (
            f"{point.bytes:,}",
            f"{point.bytes / curve.bytes_before:.3f}",
            f"{point.neurons:.3f}",
            number(point.predicted_error),
            number(point.expected_error),
            human_bytes(point.memory),
        )
        for point in curve.points
    ]
    lines = columns([heads[:-1], *cells])
    marks = ["", *(marks_text(point) for point in curve.points)]
    labels = ["size", *(human_bytes(point.size) for point in curve.points)]
    texts = [f"{line}  {mark}".rstrip() for line, mark in zip(lines, marks, strict=True)]
    tried = curve.tried
    found: list[Row] = [
        *zip(labels, texts, strict=True),
        ("tried", f"{tried.bytes:,} bytes: error {number(curve.tried_error)} on held-out calibration images"),
        ("expected", f"predicted error × {number(curve.factor)}, as there"),
    ]
    return [*found, ("wrote", png)] if png is not None else found


def marks_text(point: CurvePoint) -> str:
    """Return what a point is marked by."""
    gpus = [f"{gpu} GB" for gpu in point.gpus]
    parts = [
        "asked for" if point.is_goal else "",
        "tried" if point.is_tried else "",
        f"largest in a GPU of {' or '.join(gpus)}" if gpus else "",
    ]
    return ", ".join(filter(None, parts))
