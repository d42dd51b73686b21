"""``ditmoe report``: what a profile shows, in numbers, pictures and plain words."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ditmoe_cli import __version__
from ditmoe_cli.api.argument_checks import ending, seed_of_64_bits
from ditmoe_cli.api.output_names import usual_profiles
from ditmoe_cli.cli.groups import completing
from ditmoe_cli.cli.stage import Stage, incoming
from ditmoe_cli.cli.terminal import Printing, emit, note
from ditmoe_cli.errors import BadInputError, OutputExistsError, UsageError
from ditmoe_cli.files.fingerprint import digest
from ditmoe_cli.files.hub_names import told_name
from ditmoe_cli.files.names import ROUTER
from ditmoe_cli.files.reader import open_reader
from ditmoe_cli.files.staging import check_target, clean_leftovers, staged
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint, resolve_path
from ditmoe_cli.model.config import Given
from ditmoe_cli.routing.profile import RoutingProfile, read_profile, require_profile_of
from ditmoe_cli.routing.profile_search import own_profile
from ditmoe_cli.routing.report.claims import VARIABLES
from ditmoe_cli.routing.report.marks import holds_figures, numbers_of, printable

if TYPE_CHECKING:
    from ditmoe_cli.routing.report.contents import ProfileReport

EXAMPLES = (
    "ditmoe report profile ckpt.profile.safetensors -o report.html",
    "ditmoe profile-experts ckpt.pt | ditmoe report profile --png figures",
)


KINDS = ("profile",)
MOST_REPLICATES = 100_000  # all are in memory at once


def _checked_replicates(count: int) -> int:
    """Return a number of bootstrap replicates. Raises `UsageError` for one that memory would not hold."""
    if count > MOST_REPLICATES:
        raise UsageError(f"⟨replicates⟩ {count}: give at most {MOST_REPLICATES}, since all are in memory at once")
    return count


@dataclass(frozen=True)
class Reporting:
    """The profile to report on, and the bootstrap of its intervals."""

    panel: ClassVar[str] = "Report"

    kind: Annotated[
        str,
        typer.Argument(metavar="WHAT", autocompletion=completing(*KINDS), help="Kind of file to report on: profile."),
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
            "--replicates", metavar="N", callback=_checked_replicates, help="Bootstrap replicates for each interval."
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
    found = _usual_profile_of(checkpoint)
    if found is None:
        raise BadInputError(
            f"{file}: is a checkpoint, and no profile of it lies here or beside it; "
            "make one with ditmoe profile-experts, and name that"
        )
    return Stage(checkpoint=str(checkpoint.path.absolute()), profile=str(found))


def is_checkpoint(file: Path) -> bool:
    """Return whether a file or folder is a checkpoint; what cannot be read is none."""
    try:
        return any(name.endswith(ROUTER) for name in open_reader(file)[0].tensors)
    except BadInputError:
        return False


def usual_profile(stage: Stage) -> Path:
    """Return the profile of the envelope's checkpoint under a usual name. Raises `BadInputError` without one."""
    checkpoint = open_checkpoint(stage.checkpoint, **dict(stage.given or {})) if stage.checkpoint else None
    found = _usual_profile_of(checkpoint) if checkpoint is not None else None
    if found is None:
        raise BadInputError("stdin: the envelope names no profile; pipe in ditmoe profile-experts")
    return found


def _usual_profile_of(checkpoint: Checkpoint) -> Path | None:
    for path in usual_profiles(checkpoint):
        if own_profile(checkpoint, path, note):
            note(f"using the profile {path}")
            return path
    return None


@dataclass(frozen=True)
class ReportFiles:
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

    @property
    def is_wanted(self) -> bool:
        """Whether anything is to be written."""
        return self.page is not None or self.png is not None

    @property
    def path(self) -> str:
        """The absolute path that ``-q`` prints."""
        written = self.page or self.png
        return str(written.absolute()) if written else ""

    def to_json(self) -> dict[str, str | None]:
        """Return absolute paths."""
        return {
            "page": str(self.page.absolute()) if self.page else None,
            "png": str(self.png.absolute()) if self.png else None,
        }


def run(reporting: Reporting, to: ReportFiles, printing: Printing) -> None:
    """Report what a profile shows, and whether the paper's claims hold.

    Computes load, mutual information with intervals, heat maps, co-activation, similarity, transitions and saliency.
    Prints the essentials; figures need -o or --png, and matplotlib: pip install 'ditmoe[report]'. A report that is
    there already, of the same profile and settings, is left as it is.
    """
    if reporting.kind not in KINDS:
        raise UsageError(f"there is no report on {reporting.kind!r}; choose {' or '.join(KINDS)}")
    stage = reporting.stage()
    profile = read_profile(Path(str(stage.profile)))
    profiled = profiled_checkpoint(profile, reporting.weights)
    source = profiled.name if profiled is not None else profiled_name(stage)
    request = request_of(profile, reporting, source)
    numbers, left = unmade(to, request)
    check_outputs(left, (profile.path, *([profiled.path] if profiled else [])))
    if numbers is None or left.is_wanted:
        similarities = weight_cosines(profiled) if profiled is not None else None
        report = build_report_of(profile, reporting, similarities, source)
        write(report, left, profile.path, request)
        numbers = report.to_json()
    options = {"what": reporting.kind, "replicates": reporting.replicates, "seed": reporting.seed}
    show(printing, stage.done("report", options).to_json({**numbers, **to.to_json()}), to, left)


def profiled_checkpoint(profile: RoutingProfile, weights: str | None) -> Checkpoint | None:
    """Return the checkpoint to compare experts of; raises `BadInputError` where another one was profiled."""
    if weights is None:
        return None
    checkpoint = open_checkpoint(resolve_path(weights, note))
    require_profile_of(profile, checkpoint.fingerprint, checkpoint.path)
    return checkpoint


def profiled_name(stage: Stage) -> str | None:
    """Return the file name of the checkpoint that was profiled, where a pipe says so."""
    is_of = stage.history and stage.history[-1].get("command") == "profile-experts"
    return told_name(Path(stage.checkpoint)) if is_of and stage.checkpoint is not None else None


def request_of(profile: RoutingProfile, reporting: Reporting, source: str | None) -> str:
    """Return the digest of all that a report's bytes depend on."""
    names = [printable(name) for name in (profile.path.name, source or "")]
    settings = [reporting.replicates, reporting.seed, reporting.weights is not None]
    return digest([profile.digest, names, settings, __version__])


def unmade(to: ReportFiles, request: str) -> tuple[dict[str, Any] | None, ReportFiles]:
    """Return a report's numbers, where its page keeps them, and those of its outputs that are still to be made."""
    if to.force:
        return None, to
    numbers = numbers_of(to.page, request) if to.page is not None else None
    has_figures = to.png is not None and holds_figures(to.png, request)
    for path, is_made in ((to.page, numbers is not None), (to.png, has_figures)):
        if is_made and path is not None:
            note(f"{path} is up to date")
            clean_leftovers(path)
    return numbers, ReportFiles(None if numbers is not None else to.page, None if has_figures else to.png)


def build_report_of(
    profile: RoutingProfile, reporting: Reporting, similarities: list[Any] | None, source: str | None
) -> ProfileReport:
    """Return the report that was asked for."""
    from ditmoe_cli.routing.report.build import build_report

    return build_report(profile, reporting.replicates, reporting.seed, similarities, source)


def weight_cosines(checkpoint: Checkpoint) -> list[Any]:
    """Return the similarity of the experts' weights, block by block."""
    from ditmoe_cli.routing.report.weight_similarity import weight_similarities

    return weight_similarities(checkpoint)


def check_outputs(to: ReportFiles, inputs: tuple[Path, ...]) -> None:
    """Raise before anything is computed where the outputs cannot be drawn or written."""
    if not to.is_wanted:
        return
    from ditmoe_cli.routing.report.figures import require_matplotlib
    from ditmoe_cli.routing.report.page import require_jinja

    require_matplotlib()
    if to.page is not None:
        require_jinja()
        check_target(to.page.absolute(), to.force, inputs)
    if to.png is not None and not replaceable(to.png, to.force):
        check_target(to.png.absolute(), to.force, inputs)
    if to.page is not None and to.png is not None and to.page.absolute().parent == to.png.absolute():
        raise UsageError(f"⟨png⟩ {to.png}: is replaced as a whole; write the page beside it, not into it")


def replaceable(folder: Path, force: bool) -> bool:
    """Return whether `folder` holds PNG files alone and may be replaced. Raises `OutputExistsError` for other files."""
    if not force or folder.is_symlink() or not folder.is_dir():
        return False
    foreign = next((f for f in sorted(folder.iterdir()) if f.suffix != ".png" or not f.is_file()), None)
    if foreign is not None:
        raise OutputExistsError(f"{folder}: holds {foreign.name}, which is no figure, so it is not replaced")
    return True


def write(report: ProfileReport, to: ReportFiles, profile: Path, request: str) -> None:
    """Write the page and the figures that were asked for."""
    if not to.is_wanted:
        return
    from ditmoe_cli.routing.report.figures import draw
    from ditmoe_cli.routing.report.page import page
    from ditmoe_cli.routing.report.pictures import write_figures

    drawings = tuple(draw(report, to.page is not None, to.png is not None, request))
    if to.png is not None:
        write_figures(drawings, to.png, replaceable(to.png, to.force))
    if to.page is not None:
        with staged(to.page, to.force, (profile,)) as staging:
            staging.write_text(page(report, drawings, request), encoding="utf-8")


def show(printing: Printing, document: dict[str, Any], to: ReportFiles, written: ReportFiles) -> None:
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
