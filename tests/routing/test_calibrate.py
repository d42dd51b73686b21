"""Calibration runs, and the search for a profile that is valid."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from compressing import blocks_of
from conftest import make_pico
from profiling import count_by_hand, opened, reap_by_hand, trajectory

from ditmoe_cli.compression.apply import apply
from ditmoe_cli.compression.counts import Keep
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Experts
from ditmoe_cli.compression.prune.pruning import Pruning, plan_prune
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import BadInputError, OutputExistsError, UsageError
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.routing import calibration_settings
from ditmoe_cli.routing.calibrate import Run, calibrate, made_profile
from ditmoe_cli.routing.calibration_settings import Calibration, default_calibration, parse_calibration
from ditmoe_cli.routing.profile import RoutingProfile
from ditmoe_cli.routing.profile_search import ProfileRequest, search
from ditmoe_cli.routing.saliency import reap

PICO = make_pico(hidden=16, input_size=4, seed=3)
SPEC = SampleSpec(images=3, steps=4, cfg=1.5, seed=11, solver="ddim", classes=(0, 2))
SETTINGS = Calibration(SPEC, bins=2, reservoir=24, batch=2)


@dataclass(frozen=True)
class Family:
    """A checkpoint, two generations made from it, and the profile of the first."""

    original: Checkpoint
    child: Checkpoint
    grandchild: Checkpoint
    profile: RoutingProfile


def ghosted(checkpoint: Checkpoint, keep: tuple[int, ...], path: Path) -> Checkpoint:
    blocks = (BlockPlan(keep, "ghost"),) * checkpoint.config.depth
    apply(checkpoint, CompressionPlan("prune", checkpoint.fingerprint, stages=(Experts(blocks),)), Output(path))
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("family")
    original = opened(PICO, folder)
    child = ghosted(original, (0, 1, 3), folder / "child.safetensors")
    grandchild = ghosted(child, (0, 2), folder / "grandchild.safetensors")
    return Family(original, child, grandchild, calibrate(original, SETTINGS, Run("cpu"), folder / "p.safetensors"))


@dataclass
class Finder:
    """Searches for a valid profile, and keeps the notes and how often a device was asked for."""

    beside: Path
    notes: list[str] = field(default_factory=list)
    runs: int = 0

    def device(self) -> str:
        self.runs += 1
        return "cpu"

    def find(self, checkpoint: Checkpoint, given_profile: Path | None) -> RoutingProfile:
        basis = search(checkpoint, ProfileRequest(given_profile, beside=self.beside), self.notes.append)
        return made_profile(checkpoint, basis, self.device, self.notes.append)


@pytest.fixture
def finder(tmp_path: Path) -> Finder:
    return Finder(tmp_path)


def test_reap_from_a_profile_is_reap_by_hand(family: Family) -> None:
    expected = reap_by_hand(count_by_hand(PICO, SPEC, SETTINGS.bins, trajectory(PICO, SPEC)), SPEC.cfg)
    for found, wanted in zip(reap(family.profile.tables), expected.tolist(), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    plan = plan_prune(family.original, family.profile, Pruning(Keep(count=2)))
    best = [tuple(sorted(block.topk(2).indices.tolist())) for block in expected]
    assert [block.keep for block in blocks_of(plan)] == best
    assert plan.profile == family.profile.digest


def test_a_profile_holds_its_settings(family: Family) -> None:
    assert parse_calibration(family.profile.calibration, family.original) == SETTINGS
    assert family.profile.calibration["source"] == "trajectories"
    assert family.profile.calibration["classes"] == [0, 2]


def test_equal_runs_write_equal_files(family: Family, tmp_path: Path) -> None:
    again = calibrate(family.original, SETTINGS, Run("cpu"), tmp_path / "again.safetensors")
    assert again.path.read_bytes() == family.profile.path.read_bytes()


def test_an_output_that_is_in_the_way_is_refused_before_any_work(family: Family, tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"old")
    for path, force in ((tmp_path / "there.safetensors", False), (family.original.path, True)):
        with pytest.raises(OutputExistsError):
            calibrate(family.original, SETTINGS, Run("nonsense"), path, force)
    with pytest.raises(UsageError, match="bins 5"):
        calibrate(family.original, replace(SETTINGS, bins=5), Run("nonsense"), tmp_path / "p.safetensors")


def test_its_own_profile_is_used_as_it_is(family: Family, finder: Finder) -> None:
    found = finder.find(family.original, family.profile.path)
    assert found.path == family.profile.path
    assert (finder.notes, finder.runs, list(finder.beside.iterdir())) == ([], 0, [])


@pytest.mark.parametrize("generation", ["child", "grandchild"])
def test_with_an_ancestors_profile_the_checkpoint_is_profiled_alike(
    generation: str, family: Family, finder: Finder
) -> None:
    checkpoint = getattr(family, generation)
    found = finder.find(checkpoint, family.profile.path)
    assert found.checkpoint == checkpoint.fingerprint
    assert dict(found.calibration) == dict(family.profile.calibration)
    assert found.experts == tuple(len(block.expert_widths) for block in checkpoint.config.blocks)
    assert finder.runs == 1
    assert len(finder.notes) == 1
    assert "ancestor" in finder.notes[0]
    assert str(found.path) in finder.notes[0]
    assert found.path.parent == finder.beside
    assert checkpoint.fingerprint[:12] in found.path.name
    directly = calibrate(checkpoint, SETTINGS, Run("cpu"), finder.beside / "direct.safetensors")
    assert directly.path.read_bytes() == found.path.read_bytes()


def test_the_second_search_finds_what_the_first_made(family: Family, finder: Finder) -> None:
    first = finder.find(family.child, family.profile.path)
    made = first.path.stat()
    second = finder.find(family.child, family.profile.path)
    assert second.path == first.path
    assert second.path.stat().st_mtime_ns == made.st_mtime_ns
    assert finder.runs == 1
    assert len(finder.notes) == 2
    assert "using" in finder.notes[1]


def test_other_settings_are_profiled_anew(family: Family, finder: Finder) -> None:
    first = finder.find(family.child, family.profile.path)
    others = replace(SETTINGS, spec=replace(SPEC, seed=12))
    elsewhere = calibrate(family.original, others, Run("cpu"), finder.beside / "others.safetensors")
    second = finder.find(family.child, elsewhere.path)
    assert finder.runs == 2
    assert second.calibration["seed"] == 12
    assert second.path == first.path  # one place for each checkpoint: the later settings win


def test_a_kept_profile_of_other_weights_is_not_trusted(family: Family, finder: Finder) -> None:
    kept = finder.find(family.child, family.profile.path).path
    kept.write_bytes(family.profile.path.read_bytes())
    again = finder.find(family.child, family.profile.path)
    assert again.checkpoint == family.child.fingerprint
    assert finder.runs == 2


def test_without_any_profile_the_default_settings_are_used(
    family: Family, finder: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_settings, "MOST_IMAGES", 3)
    monkeypatch.setattr(calibration_settings, "STEPS", 10)
    found = finder.find(family.child, None)
    assert dict(found.calibration) == default_calibration(family.child).to_json()
    assert "no profile" in finder.notes[0]
    assert found.checkpoint == family.child.fingerprint
    assert finder.find(family.child, None).path == found.path
    assert finder.runs == 1


def test_the_profile_of_an_unrelated_checkpoint_is_refused(family: Family, finder: Finder, tmp_path: Path) -> None:
    folder = tmp_path / "strangers"
    folder.mkdir()
    stranger = opened(make_pico(hidden=16, input_size=4, seed=4), folder)
    child_profile = calibrate(family.child, SETTINGS, Run("cpu"), folder / "child.safetensors")
    # neither an unrelated checkpoint's, nor a descendant's
    for checkpoint, path in ((stranger, family.profile.path), (family.original, child_profile.path)):
        with pytest.raises(BadInputError, match="profile of another checkpoint"):
            finder.find(checkpoint, path)
    assert (finder.notes, finder.runs) == ([], 0)
    assert [path.name for path in finder.beside.iterdir()] == ["strangers"]
