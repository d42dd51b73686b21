"""``ditmoe report``: what a profile says, in numbers, pictures and plain words."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ditmoe_cli.cli.options import Force, Json, Quiet, given
from ditmoe_cli.cli.stage import Stage, incoming
from ditmoe_cli.cli.terminal import Printing, emit, progress
from ditmoe_cli.errors import BadInputError, OutputExistsError, UsageError

if TYPE_CHECKING:
    from ditmoe_cli.routing.profile import RoutingProfile
    from ditmoe_cli.routing.report.contents import ProfileReport

KINDS = ("profile",)
WhatArg = Annotated[str, typer.Argument(metavar="WHAT", help="What to report on: profile.")]
FileArg = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Argument(metavar="FILE", help="A profile of ditmoe profile-experts; else that of the envelope on stdin."),
]
PageOutput = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("-o", "--output", metavar="FILE", help="FILE.html to write: one page that needs no network."),
]
PngOpt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--png", metavar="FOLDER", help="Write the figures as PNG files into a new folder."),
]
WeightsOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--weights",
        metavar="CHECKPOINT",
        help="The profiled checkpoint, to compare experts by their weights too; slow for wide experts.",
    ),
]
Replicates = Annotated[int, typer.Option("--replicates", metavar="N", help="Bootstrap replicates of each interval.")]
SeedOpt = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the bootstrap.")]


@dataclass(frozen=True)
class Outputs:
    """Where a report goes."""

    page: Path | None
    png: Path | None
    force: bool

    @property
    def path(self) -> str:
        """Return what ``-q`` prints."""
        made = self.page or self.png
        return str(made.absolute()) if made else ""

    def to_json(self) -> dict[str, str | None]:
        """Return absolute paths."""
        return {
            "page": str(self.page.absolute()) if self.page else None,
            "png": str(self.png.absolute()) if self.png else None,
        }


def run(
    what: WhatArg,
    file: FileArg = None,
    replicates: Replicates = 200,
    seed: SeedOpt = 0,
    output: PageOutput = None,
    png: PngOpt = None,
    weights: WeightsOpt = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a profile shows, and whether the paper's claims hold.

    Load, mutual information with intervals, heat maps, co-activation, similarity, transitions, saliency. Prints the
    essentials; figures need -o or --png, and matplotlib: pip install 'ditmoe[report]'.
    """
    outputs = Outputs(output, png, force)
    check_values(what, outputs)
    stage = profile_stage(file)
    from ditmoe_cli.routing.profile import read_profile
    from ditmoe_cli.routing.report.build import build_report

    check_outputs(outputs, Path(str(stage.profile)))
    profile = read_profile(Path(str(stage.profile)))
    similarities = weight_cosines(profile, weights) if weights else None
    found = build_report(profile, replicates, seed, progress, similarities)
    write(found, outputs, Path(str(stage.profile)))
    done = stage.done("report", {"what": what, "replicates": replicates, "seed": seed})
    show(Printing(json, quiet), done.to_json({**found.to_json(), **outputs.to_json()}), found, outputs)


def weight_cosines(profile: RoutingProfile, weights: str) -> list[Any]:
    """Return the similarity of the experts' weights; raises `BadInputError` where `weights` was not profiled."""
    from ditmoe_cli.model.opened import open_checkpoint
    from ditmoe_cli.routing.profile import require_profile_of
    from ditmoe_cli.routing.report.weight_similarity import weight_similarities

    checkpoint = open_checkpoint(weights)
    require_profile_of(profile, checkpoint.fingerprint, checkpoint.path)
    return weight_similarities(checkpoint, progress)


def check_values(what: str, outputs: Outputs) -> None:
    """Raise `UsageError` for words that mean nothing here."""
    if what not in KINDS:
        raise UsageError(f"there is no report on {what!r}; choose {' or '.join(KINDS)}")
    if outputs.page is not None and outputs.page.suffix not in (".html", ".htm"):
        raise UsageError(f"--output {outputs.page}: give a name that ends in .html")


def profile_stage(file: Path | None) -> Stage:
    """Return the stage of a profile given by name, else the envelope on stdin, which must name one."""
    if file is not None:
        return Stage(profile=str(file.absolute()))
    if sys.stdin is not None and sys.stdin.isatty():
        raise UsageError("give a profile FILE, or pipe in ditmoe profile-experts")
    stage = incoming(None, given(None, None, None))
    if stage.profile is None:
        raise BadInputError("stdin: the envelope names no profile; pipe in ditmoe profile-experts")
    return stage


def check_outputs(outputs: Outputs, profile: Path) -> None:
    """Raise before anything is computed where the outputs cannot be drawn or written."""
    if outputs.page is None and outputs.png is None:
        return
    from ditmoe_cli.files.staging import check_target
    from ditmoe_cli.routing.report.figures import require_matplotlib
    from ditmoe_cli.routing.report.page import require_jinja

    require_matplotlib()
    if outputs.page is not None:
        require_jinja()
        check_target(outputs.page.absolute(), outputs.force, (profile,))
    if outputs.png is not None and not replaceable(outputs.png, outputs.force):
        check_target(outputs.png.absolute(), outputs.force, (profile,))


def replaceable(folder: Path, force: bool) -> bool:
    """Tell whether `folder` is one of PNG files alone that may be replaced. Raises `OutputExistsError` for others."""
    if not force or folder.is_symlink() or not folder.is_dir():
        return False
    foreign = next((f for f in sorted(folder.iterdir()) if f.suffix != ".png" or not f.is_file()), None)
    if foreign is not None:
        raise OutputExistsError(f"{folder}: holds {foreign.name}, which is no figure, so it is not replaced")
    return True


def write(found: ProfileReport, outputs: Outputs, profile: Path) -> None:
    """Write the page and the figures that were asked for."""
    if outputs.page is None and outputs.png is None:
        return
    from ditmoe_cli.files.staging import staged
    from ditmoe_cli.routing.report.figures import draw, write_figures
    from ditmoe_cli.routing.report.page import page

    drawings = tuple(draw(found, svg=outputs.page is not None, png=outputs.png is not None))
    if outputs.png is not None:
        write_figures(drawings, outputs.png, replaceable(outputs.png, outputs.force))
    if outputs.page is not None:
        with staged(outputs.page, outputs.force, (profile,)) as staging:
            staging.write_text(page(found, drawings), encoding="utf-8")


def show(printing: Printing, document: dict[str, Any], found: ProfileReport, outputs: Outputs) -> None:
    """Print the essentials: tables on a terminal, else the envelope."""
    if printing.quiet or printing.as_json or not sys.stdout.isatty():
        emit(printing, document, (), outputs.path)
        return
    from rich.console import Console

    console = Console(highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")
    for claim in found.claims:
        console.print(f"[bold]{claim.statement}: {claim.verdict}[/bold]")
        console.print(claim.sentence, markup=False)
    console.print(table(found))
    for what, pairs in (("dead", found.dead), ("starved", found.starved)):
        console.print(f"{what}: " + (", ".join(f"block {b} expert {e}" for b, e in pairs) or "none"))
    for path in filter(None, outputs.to_json().values()):
        print(f"wrote {path}")


def table(found: ProfileReport) -> Any:
    """Return a rich table of the numbers by block."""
    from rich.table import Table

    names = [name for name in found.evidence.information if name != "branch"]
    made = Table("block", "entropy", *(f"{name} %" for name in names), "top-k mass", box=None, pad_edge=False)
    for i, block in enumerate(found.blocks):
        told = (block.information[name] for name in names)
        cells = [f"{100 * e.corrected:.1f} \\[{100 * e.low:.1f}, {100 * e.high:.1f}]" for e in told]
        made.add_row(str(i), f"{block.entropy:.3f}", *cells, f"{block.router['topk_mass'].mean():.2f}")
    return made
