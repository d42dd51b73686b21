"""``ditmoe compress --curve``: sizes against damage as a table, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_cli.api.argument_checks import refuse_idle
from ditmoe_cli.api.devices import checked_device
from ditmoe_cli.api.foretelling import foretell
from ditmoe_cli.api.planner_runs import choosing, prepared
from ditmoe_cli.api.step_texts import number
from ditmoe_cli.cli.calibration_options import AutomaticProfile
from ditmoe_cli.cli.options import Destination, Measuring, Source
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing, Row, columns, emit, note
from ditmoe_cli.compression.joint.size_curve import CurvePoint, Curving, SizeCurve
from ditmoe_cli.compression.planner import Work
from ditmoe_cli.files.staging import check_target, staged
from ditmoe_cli.progress import human_bytes
from ditmoe_cli.routing.calibrate import made_profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    beside = to.at(checkpoint.path, "curve")
    if png is not None:
        _check_picture(png, to.force, (checkpoint.path, *filter(None, [measuring.profile_for(stage)])))
    work = Work(checkpoint, beside, lambda: checked_device(measuring.device), note)
    wanted = automatic.request(stage, checkpoint, measuring, beside.path.parent)
    planner = curving.planner(work)
    work, basis = prepared(planner, work, wanted)
    assert basis is not None
    foretell(choosing(planner, work, basis), work.device)
    profile = made_profile(checkpoint, basis, work.device, note)
    curve = curving.curve(work, profile)
    if png is not None:
        with staged(png.absolute(), to.force, (checkpoint.path, profile.path)) as staging:
            staging.write_bytes(picture(curve, checkpoint.name))
    told = {**curve.to_json(), "png": str(png.absolute()) if png is not None else None}
    onward = replace(stage, profile=str(profile.path.absolute()))
    emit(output.printing, onward.to_json(told), rows(curve, png), str(png.absolute()) if png is not None else None)


def _check_picture(png: Path, force: bool, inputs: Sequence[Path]) -> None:
    """Raise before anything is measured where the picture cannot be drawn or written."""
    from ditmoe_cli.routing.report.figures import require_matplotlib

    require_matplotlib()
    check_target(png.absolute(), force, inputs)


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


def picture(curve: SizeCurve, name: str) -> bytes:
    """Return the curve as PNG, on logarithmic axes."""
    from matplotlib.figure import Figure

    from ditmoe_cli.routing.report.figures import styled
    from ditmoe_cli.routing.report.pictures import png_of

    with styled():
        figure = Figure(layout="constrained", figsize=(7.2, 4.2))
        paint(figure, curve)
        figure.suptitle(f"Sizes and errors: {name}", fontsize=9, parse_math=False)
        return png_of(figure)


def paint(figure: Figure, curve: SizeCurve) -> None:
    """Paint predicted and expected errors over bytes, the tried one as a cross, and a line at each mark."""
    from matplotlib.ticker import NullLocator

    from ditmoe_cli.routing.report.painters import COLOURS
    from ditmoe_cli.routing.report.pictures import INK

    panel: Any = figure.subplots()
    known = [point for point in curve.points if point.predicted_error > 0]  # a logarithm of 0 has no place
    sizes = [point.bytes for point in known]
    panel.plot(sizes, [point.expected_error for point in known], color=COLOURS[0], marker="o", markersize=3)
    panel.plot(sizes, [point.predicted_error for point in known], color=COLOURS[1], linewidth=1, linestyle="--")
    panel.scatter([curve.tried.bytes], [curve.tried_error], marker="x", color=INK, zorder=3)
    panel.legend(["expected", "predicted", "tried"], loc="lower left")
    for point in curve.points:
        told = [*(f"{gpu} GB GPU" for gpu in point.gpus), *(["asked for"] if point.is_goal else [])]
        if told:
            panel.axvline(point.bytes, color=INK, linewidth=0.8, linestyle=":")
            label = ", ".join(told)
            place = (point.bytes, 1.0)
            panel.annotate(label, place, xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(sizes[::3], [human_bytes(size) for size in sizes[::3]])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("bytes of the file")
    panel.set_ylabel("relative squared error of the guided prediction")
    panel.grid(alpha=0.2, linewidth=0.5)
