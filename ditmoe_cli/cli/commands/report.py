"""``ditmoe report``: what a profile shows, in numbers, pictures and plain words."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from ditmoe_cli.api import report_runs as asked
from ditmoe_cli.api.argument_checks import ending, seed_of_64_bits
from ditmoe_cli.api.report_runs import (
    few_enough_replicates,
    is_checkpoint,
    own_usual_profile,
    reported,
    required_profile,
)
from ditmoe_cli.cli.groups import completing
from ditmoe_cli.cli.stage import Stage, incoming
from ditmoe_cli.cli.terminal import Printing, emit, note
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.files.hub_names import told_name
from ditmoe_cli.model.checkpoint import open_checkpoint, resolve_path
from ditmoe_cli.model.config import Given
from ditmoe_cli.routing.profile import read_profile
from ditmoe_cli.routing.report.claims import VARIABLES

EXAMPLES = (
    "ditmoe report profile ckpt.profile.safetensors -o report.html",
    "ditmoe profile-experts ckpt.pt | ditmoe report profile --png figures",
)
KINDS = ("profile",)
SENSITIVITY = "sensitivity"  # a command of its own where it is the first word


@dataclass(frozen=True)
class Reporting:
    """The profile to report on, and the bootstrap of its intervals."""

    panel: ClassVar[str] = "Report"

    kind: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            autocompletion=completing(*KINDS, SENSITIVITY),
            help="Kind of file to report on: profile. See ditmoe report sensitivity --help for maps of sensitivity.",
        ),
    ]
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="Profile that ditmoe profile-experts wrote, or a checkpoint whose profile has its usual name. Without "
            "it, the one that the command before in the pipe names.",
        ),
    ] = None
    replicates: Annotated[
        int,
        typer.Option(
            "--replicates", metavar="N", callback=few_enough_replicates, help="Bootstrap replicates for each interval."
        ),
    ] = 200
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", callback=seed_of_64_bits, help="Seed of the bootstrap.")
    ] = 0
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="CHECKPOINT",
            help="The profiled checkpoint, to compare experts by their weights too; slow for wide experts.",
        ),
    ] = None

    sensitivity: Annotated[
        Path | None,
        typer.Option(
            "--sensitivity",
            metavar="FILE",
            help="Map of the profiled checkpoint that ditmoe report sensitivity wrote, to show it too.",
        ),
    ] = None

    @property
    def asked(self) -> asked.Reporting:
        """The same as reports take it."""
        return asked.Reporting(self.replicates, self.seed, self.weights, self.sensitivity)

    def stage(self) -> Stage:
        """Return the stage of the profile that is named, else the envelope on stdin, which must name one."""
        if self.file is not None:
            return _stage_of(self.file)
        missing = "no profile: give a profile FILE, or pipe in ditmoe profile-experts"
        stage = incoming(None, Given(), missing=missing)
        if stage.profile is None:
            return replace(stage, profile=str(usual_profile(stage)))
        return stage


def _stage_of(file: Path) -> Stage:
    """Return the stage of a profile, or of the profile that a checkpoint has under a usual name."""
    path = resolve_path(file, note)
    if not is_checkpoint(path):
        return Stage(profile=str(path.absolute()))
    checkpoint = open_checkpoint(path, allow_unknown=True)
    return Stage(checkpoint=str(checkpoint.path.absolute()), profile=str(required_profile(checkpoint)))


def usual_profile(stage: Stage) -> Path:
    """Return the profile of the envelope's checkpoint under a usual name. Raises `BadInputError` without one."""
    checkpoint = open_checkpoint(stage.checkpoint, **dict(stage.given or {})) if stage.checkpoint else None
    found = own_usual_profile(checkpoint) if checkpoint is not None else None
    if found is None:
        raise BadInputError("stdin: the envelope names no profile; pipe in ditmoe profile-experts")
    return found


@dataclass(frozen=True)
class ReportFiles(asked.ReportFiles):
    """Where a report goes."""

    panel: ClassVar[str] = "Output"

    page: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            callback=ending(".html", ".htm"),
            help="FILE.html to write the report to: one page that needs no network.",
        ),
    ] = None
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FOLDER", help="New folder to write the figures to as PNG files.")
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace existing to.")] = False


def run(reporting: Reporting, to: ReportFiles, printing: Printing) -> None:
    """Report what a profile shows, and whether the paper's claims hold.

    Computes load, mutual information with intervals, heat maps, co-activation, similarity, transitions and saliency.
    Prints the essentials; figures need -o or --png, and matplotlib: pip install 'ditmoe[report]'. A report that is
    there already, of the same profile and settings, is left as it is.
    """
    if reporting.kind == SENSITIVITY:
        raise UsageError(
            "sensitivity has options of its own and goes before them: ditmoe report sensitivity CHECKPOINT …"
        )
    if reporting.kind not in KINDS:
        raise UsageError(f"there is no report on {reporting.kind!r}; choose {' or '.join((*KINDS, SENSITIVITY))}")
    stage = reporting.stage()
    profile = read_profile(Path(str(stage.profile)))
    numbers, left = reported(profile, reporting.asked, to, profiled_name(stage))
    options = {"what": reporting.kind, "replicates": reporting.replicates, "seed": reporting.seed}
    show(printing, stage.done("report", options).to_json({**numbers, **to.to_json()}), to, left)


def profiled_name(stage: Stage) -> str | None:
    """Return the file name of the checkpoint that was profiled, where a pipe says so."""
    is_of = stage.history and stage.history[-1].get("command") == "profile-experts"
    return told_name(Path(stage.checkpoint)) if is_of and stage.checkpoint is not None else None


def show(printing: Printing, document: dict[str, Any], to: asked.ReportFiles, written: asked.ReportFiles) -> None:
    """Print the essentials: tables for people, else the envelope."""
    if printing.quiet or not printing.is_text:
        emit(printing, document, (), to.path)
        return
    from rich.console import Console

    numbers = document["result"]
    console = Console(highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")
    for claim in numbers["claims"]:
        console.print(f"[bold]{claim['claim']}: {claim['verdict']}[/bold]")
        console.print(claim["sentence"], markup=False)
    console.print(table(numbers))
    for label in ("dead", "starved"):
        console.print(f"{label}: " + (", ".join(f"block {b} expert {e}" for b, e in numbers[label]) or "none"))
    for path in filter(None, written.to_json().values()):
        print(f"wrote {path}")


def table(numbers: dict[str, Any]) -> Any:
    """Return a rich table of the numbers by block."""
    from rich.table import Table

    names = [name for name in VARIABLES if name != "branch" and name in numbers["evidence"]["information"]]
    result = Table("block", "entropy", *(f"{name} %" for name in names), "top-k mass", box=None, pad_edge=False)
    for i, block in enumerate(numbers["blocks"]):
        estimates = (block["information"][name] for name in names)
        cells = [f"{100 * e['corrected']:.1f} \\[{100 * e['low']:.1f}, {100 * e['high']:.1f}]" for e in estimates]
        mass = block["router"]["topk_mass"]
        result.add_row(str(i), f"{block['normalised_entropy']:.3f}", *cells, f"{sum(mass) / len(mass):.2f}")
    return result
