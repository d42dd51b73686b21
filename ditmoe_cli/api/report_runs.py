"""Reports on a profile: kept from an earlier run, or made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_cli.api.calling import AnyCheckpoint
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.opening import opened
from ditmoe_cli.api.output_names import usual_profiles
from ditmoe_cli.api.planning_requests import AnyProfile
from ditmoe_cli.briefs import Brief, Fact
from ditmoe_cli.errors import BadInputError, OutputExistsError, UsageError
from ditmoe_cli.files.fingerprint import digest
from ditmoe_cli.files.names import ROUTER
from ditmoe_cli.files.reader import open_reader
from ditmoe_cli.files.staging import check_target, clean_leftovers, staged
from ditmoe_cli.model.checkpoint import Checkpoint, resolve_path
from ditmoe_cli.routing.profile import RoutingProfile, read_profile, require_profile_of
from ditmoe_cli.routing.profile_search import own_profile
from ditmoe_cli.routing.report.marks import holds_figures, numbers_of, printable
from ditmoe_cli.routing.sensitivity.sensitivity_map import SensitivityMap, read_map
from ditmoe_cli.version import __version__

if TYPE_CHECKING:
    from ditmoe_cli.routing.report.contents import ProfileReport

MOST_REPLICATES = 100_000  # all are in memory at once


def few_enough_replicates(count: int) -> int:
    """Return a number of bootstrap replicates. Raises `ValueError` for one that memory would not hold."""
    if count > MOST_REPLICATES:
        raise ValueError(f"give at most {MOST_REPLICATES}, since all are in memory at once")
    return count


@dataclass(frozen=True)
class Reporting:
    """The bootstrap of a report's intervals, and what is shown besides.

    `weights` is the profiled checkpoint, where experts are compared by weights too, `sensitivity` a file with its map.
    """

    replicates: int = 200
    seed: int = 0
    weights: AnyCheckpoint | None = None
    sensitivity: Path | None = None

    def map_of(self, profile: RoutingProfile) -> SensitivityMap | None:
        """Return the map that is given. Raises `BadInputError` for another kind of file or another checkpoint."""
        if self.sensitivity is None:
            return None
        found = read_map(self.sensitivity)
        if found.checkpoint != profile.checkpoint:
            raise BadInputError(
                f"{self.sensitivity}: is a map of another checkpoint ({found.checkpoint[:12]}), not of the "
                f"profiled one ({profile.checkpoint[:12]}); make it with ditmoe report sensitivity"
            )
        return found


@dataclass(frozen=True)
class ReportFiles:
    """Where a report goes."""

    page: Path | None = None
    png: Path | None = None
    force: bool = False

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


def reported(
    profile: RoutingProfile, reporting: Reporting, to: ReportFiles, name: str | None = None
) -> tuple[dict[str, Any], ReportFiles]:
    """Return a report's numbers, and those of its files that had to be written; `name` is that of the checkpoint."""
    profiled = profiled_checkpoint(profile, reporting.weights)
    source = profiled.name if profiled is not None else name
    sensitivity = reporting.map_of(profile)
    request = request_of(profile, reporting, source, sensitivity)
    numbers, left = unmade(to, request)
    beside = [profiled.path] if profiled else []
    check_outputs(left, (profile.path, *beside, *([reporting.sensitivity] if reporting.sensitivity else [])))
    if numbers is None or left.is_wanted:
        similarities = weight_cosines(profiled) if profiled is not None else None
        report = build_report_of(profile, reporting, similarities, source, sensitivity)
        write(report, left, profile.path, request)
        numbers = report.to_json()
    return numbers, left


def profiled_checkpoint(profile: RoutingProfile, weights: AnyCheckpoint | None) -> Checkpoint | None:
    """Return the checkpoint to compare experts of; raises `BadInputError` where another one was profiled."""
    if weights is None:
        return None
    checkpoint = opened(weights, told=False)
    require_profile_of(profile, checkpoint.fingerprint, checkpoint.path)
    return checkpoint


def request_of(
    profile: RoutingProfile, reporting: Reporting, source: str | None, sensitivity: SensitivityMap | None = None
) -> str:
    """Return the digest of all that a report's bytes depend on."""
    names = [printable(name) for name in (profile.path.name, source or "")]
    settings = [reporting.replicates, reporting.seed, reporting.weights is not None]
    shown = [] if sensitivity is None else [sensitivity.to_json()]
    return digest([profile.digest, names, settings, __version__, *shown])


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
    profile: RoutingProfile,
    reporting: Reporting,
    similarities: list[Any] | None,
    source: str | None,
    sensitivity: SensitivityMap | None,
) -> ProfileReport:
    """Return the report that was asked for."""
    from ditmoe_cli.routing.report.build import build_report

    return build_report(profile, reporting.replicates, reporting.seed, similarities, source, sensitivity)


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


def is_checkpoint(file: Path) -> bool:
    """Return whether a file or folder is a checkpoint; what cannot be read is none."""
    try:
        return any(name.endswith(ROUTER) for name in open_reader(file)[0].tensors)
    except BadInputError:
        return False


def own_usual_profile(checkpoint: Checkpoint) -> Path | None:
    """Return the profile of a checkpoint under a usual name; None where there is none."""
    for path in usual_profiles(checkpoint):
        if own_profile(checkpoint, path, note):
            note(f"using the profile {path}")
            return path
    return None


def required_profile(checkpoint: Checkpoint) -> Path:
    """Return the profile of a checkpoint under a usual name. Raises `BadInputError` where there is none."""
    found = own_usual_profile(checkpoint)
    if found is None:
        raise BadInputError(
            f"{checkpoint.path}: is a checkpoint, and no profile of it lies here or beside it; "
            "make one with ditmoe profile-experts, and name that"
        )
    return found


@dataclass(frozen=True, repr=False)
class ProfileFindings(Brief):
    """What a profile shows.

    Attributes:
        figures: all numbers of the report, by name; docs/report.md describes them.
        page, png: the page and the folder of figures, where they were asked for.
    """

    figures: Mapping[str, Any]
    page: Path | None = None
    png: Path | None = None

    @property
    def claims(self) -> Mapping[str, str]:
        """The verdict on each claim of the paper."""
        return {claim["claim"]: claim["verdict"] for claim in self.figures["claims"]}

    def _brief(self) -> list[Fact]:
        pairs = {label: self.figures[label] for label in ("dead", "starved")}
        return [
            *self.claims.items(),
            *(
                (label, ", ".join(f"block {b} expert {e}" for b, e in found) or "none")
                for label, found in pairs.items()
            ),
            *((name, path) for name, path in (("page", self.page), ("png", self.png)) if path is not None),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return all numbers by name."""
        return dict(self.figures)


def findings_of(profile: AnyProfile | AnyCheckpoint, reporting: Reporting, to: ReportFiles) -> ProfileFindings:
    """Return what a profile shows, or the profile that a checkpoint has under its usual name."""
    found = profile if isinstance(profile, RoutingProfile) else read_profile(_profile_file(profile))
    figures, _ = reported(found, reporting, to)
    return ProfileFindings(figures, to.page, to.png)


def _profile_file(path: AnyCheckpoint) -> Path:
    """Return the file of a profile that is named, or that a checkpoint has under its usual name."""
    if isinstance(path, Checkpoint):
        return required_profile(path)
    file = resolve_path(path, note)
    return required_profile(opened(file, told=False)) if is_checkpoint(file) else file
