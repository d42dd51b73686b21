"""Curves of sizes against errors: measured, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_cli.api.devices import checked_device
from ditmoe_cli.api.foretelling import foretell
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.planner_runs import choosing, prepared
from ditmoe_cli.briefs import Brief, Fact, shortened
from ditmoe_cli.compression.joint.size_curve import CurvePoint, Curving, SizeCurve
from ditmoe_cli.compression.planner import Work
from ditmoe_cli.files.staging import check_target, staged
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.progress import human_bytes
from ditmoe_cli.routing.calibrate import made_profile
from ditmoe_cli.routing.profile_search import ProfileRequest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class MeasuredCurve(Brief):
    """What a checkpoint's sizes cost.

    Attributes:
        curve: the curve itself, with the error of the plan that was tried.
        profile: the routing profile that it rests on.
        png: its picture; None where none was asked for.
    """

    curve: SizeCurve
    profile: Path
    png: Path | None = None

    @property
    def points(self) -> tuple[CurvePoint, ...]:
        """Its points by rising size, each with the ``.plan`` that `apply` takes."""
        return self.curve.points

    def _brief(self) -> list[Fact]:
        before = self.curve.bytes_before
        return [
            *(
                (human_bytes(point.size), f"{point.bytes / before:.3f}, error {shortened(point.expected_error)}")
                for point in self.points
            ),
            ("tried", f"{self.curve.tried.bytes:,} bytes, error {shortened(self.curve.tried_error)}"),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the curve by name, and the path of its picture."""
        return {**self.curve.to_json(), "png": str(self.png.absolute()) if self.png is not None else None}


@dataclass(frozen=True)
class CurveFiles:
    """Where the picture goes, if there is to be one."""

    png: Path | None = None
    force: bool = False


def measured_curve(
    curving: Curving, checkpoint: Checkpoint, wanted: ProfileRequest, device: str, beside: Path, files: CurveFiles
) -> MeasuredCurve:
    """Measure a checkpoint's curve, and draw it where that is asked for; plans are tried beside the path `beside`.

    Raises before anything is measured where the picture cannot be drawn or written.
    """
    png = files.png
    if png is not None:
        given = [wanted.given] if wanted.given is not None else []
        _check_picture(png, files.force, (checkpoint.path, *given))
    work = Work(checkpoint, Output(beside), lambda: checked_device(device), note)
    planner = curving.planner(work)
    work, basis = prepared(planner, work, wanted)
    assert basis is not None  # as errors are measured on one
    foretell(choosing(planner, work, basis), work.device)
    profile = made_profile(checkpoint, basis, work.device, note)
    curve = curving.curve(work, profile)
    if png is not None:
        with staged(png.absolute(), files.force, (checkpoint.path, profile.path)) as staging:
            staging.write_bytes(picture(curve, checkpoint.name))
    return MeasuredCurve(curve, profile.path, png)


def _check_picture(png: Path, force: bool, inputs: Sequence[Path]) -> None:
    """Raise before anything is measured where the picture cannot be drawn or written."""
    from ditmoe_cli.routing.report.figures import require_matplotlib

    require_matplotlib()
    check_target(png.absolute(), force, inputs)


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
