"""Which profile planning takes, and with which settings one is made where there is none."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from compressing import pruning
from conftest import make_pico
from distilling import DistilledPair, distilled_pair
from profiling import opened

from ditmoe_cli.compression.apply import apply
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.routing.calibrate import Run, calibrate
from ditmoe_cli.routing.calibration_data import CalibrationData, read_data
from ditmoe_cli.routing.calibration_settings import Calibration, WantedCalibration, default_calibration
from ditmoe_cli.routing.profile import RoutingProfile
from ditmoe_cli.routing.profile_search import Basis, ProfileRequest, search

SPEC = SampleSpec(images=3, steps=4, cfg=1.5, seed=11, solver="ddim", classes=(0, 2))
SETTINGS = Calibration(SPEC, bins=2, reservoir=24, batch=2)


@dataclass(frozen=True)
class Family:
    """A checkpoint with a profile, one pruned with it, and one of its descendants without a profile of its own."""

    original: Checkpoint
    profile: RoutingProfile
    child: Checkpoint
    grandchild: Checkpoint


def descendant(of: Checkpoint, path: Path, keep: tuple[int, ...], settings: Calibration | None) -> Checkpoint:
    plan = pruning(of, [keep] * of.config.depth)
    apply(of, replace(plan, calibration=settings.to_json() if settings else None), Output(path))
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("family")
    original = opened(make_pico(hidden=16, input_size=4, in_channels=1, seed=3), folder)
    profile = calibrate(original, SETTINGS, Run("cpu"), folder / "original.profile.safetensors")
    assert profile is not None
    child = descendant(original, folder / "child.safetensors", (0, 1, 3), SETTINGS)
    return Family(original, profile, child, descendant(child, folder / "grandchild.safetensors", (0, 2), None))


def found(checkpoint: Checkpoint, request: ProfileRequest) -> tuple[Basis, list[str]]:
    notes: list[str] = []
    return search(checkpoint, request, notes.append), notes


def test_a_profile_with_the_usual_name_is_used_and_said(family: Family, tmp_path: Path) -> None:
    request = ProfileRequest(usual=(tmp_path / "absent.safetensors", family.profile.path))
    basis, notes = found(family.original, request)
    assert basis.profile is not None and basis.path == family.profile.path
    assert notes == [f"using the profile {family.profile.path} (cfg 1.5, 4 steps, 3 images)"]


def test_a_given_profile_comes_before_one_with_the_usual_name(family: Family, tmp_path: Path) -> None:
    given = Path(shutil.copy(family.profile.path, tmp_path / "mine.safetensors"))
    basis, notes = found(family.original, ProfileRequest(given, usual=(family.profile.path,)))
    assert (basis.path, notes) == (given, [])


@pytest.mark.parametrize("content", [b"no profile", None])
def test_what_is_no_profile_of_the_checkpoint_is_passed_over_with_a_word(
    content: bytes | None, family: Family, tmp_path: Path
) -> None:
    path = tmp_path / "child.profile.safetensors"
    path.write_bytes(family.profile.path.read_bytes() if content is None else content)
    basis, notes = found(family.child, ProfileRequest(usual=(path,)))
    assert basis.profile is None
    assert len(notes) == 1 and notes[0].startswith(f"passing over {path}: ")


def test_a_usual_profile_of_other_settings_than_asked_for_is_passed_over(family: Family) -> None:
    request = ProfileRequest(usual=(family.profile.path,), wanted=WantedCalibration(cfg=4.0))
    basis, notes = found(family.original, request)
    assert basis.profile is None and basis.settings["cfg"] == 4.0
    assert "calibration_cfg" in notes[0] and "1.5" in notes[0]


def test_settings_that_the_given_profile_was_not_made_with_are_refused(family: Family, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"calibration_steps 8: the profile was made with 4 .*leave one of both out"):
        search(family.original, ProfileRequest(family.profile.path, WantedCalibration(steps=8)), print)
    images = data_file(tmp_path)
    with pytest.raises(UsageError, match=r"calibration_data .*the profile was made with images that it sampled"):
        search(family.original, ProfileRequest(family.profile.path, data=images), print)
    basis, _ = found(family.original, ProfileRequest(family.profile.path, WantedCalibration(steps=4, cfg=1.5)))
    assert basis.profile is not None


@pytest.mark.parametrize("generation", ["child", "grandchild"])
def test_the_history_of_a_file_says_how_to_profile_it(generation: str, family: Family) -> None:
    basis, notes = found(getattr(family, generation), ProfileRequest())
    assert (basis.profile, basis.calibration, notes) == (None, SETTINGS, [])
    assert basis.reason == "as the profile of its ancestor: cfg 1.5, 4 steps, 3 images"


def test_what_is_asked_for_goes_over_the_ancestors_settings(family: Family) -> None:
    basis, _ = found(family.child, ProfileRequest(wanted=WantedCalibration(cfg=4.0)))
    assert basis.calibration == replace(SETTINGS, spec=replace(SPEC, cfg=4.0))
    assert basis.reason == "as the profile of its ancestor but for what was asked for: cfg 4, 4 steps, 3 images"


def test_without_an_ancestor_the_defaults_are_used(family: Family) -> None:
    basis, _ = found(family.original, ProfileRequest())
    assert basis.calibration == default_calibration(family.original)
    assert basis.reason == "no profile was given: cfg 1, 20 steps, 64 images"


def test_after_a_fast_profile_without_reservoir_a_descendant_gets_a_full_one(family: Family, tmp_path: Path) -> None:
    fast = replace(SETTINGS, fast=True, reservoir=0)
    child = descendant(family.original, tmp_path / "child.safetensors", (0, 1), fast)
    basis, _ = found(child, ProfileRequest())
    assert basis.calibration == replace(SETTINGS, reservoir=Calibration.reservoir)


# images that were given


def data_file(folder: Path, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 4, 4, 1)).astype(np.uint8)
    np.savez(folder / f"images{seed}.npz", arr_0=pixels, labels=np.array([2, 0, 1]))
    return folder / f"images{seed}.npz"


def noised_descendant(family: Family, folder: Path) -> tuple[Checkpoint, CalibrationData, Calibration]:
    data = read_data(data_file(folder), family.original.config, 3)
    settings = replace(SETTINGS, spec=replace(SPEC, classes=data.labels), data=data.digest)
    return descendant(family.original, folder / "noised.safetensors", (0, 1), settings), data, settings


def test_images_of_an_ancestors_profile_are_asked_for_by_their_digest(family: Family, tmp_path: Path) -> None:
    child, data, _ = noised_descendant(family, tmp_path)
    with pytest.raises(BadInputError, match=f"SHA-256 {data.digest[:12]}.*calibration_data"):
        search(child, ProfileRequest(), print)
    with pytest.raises(BadInputError, match="calibration_data"):
        search(child, ProfileRequest(piped_data=data_file(tmp_path, seed=1)), print)


def test_images_that_are_given_again_or_lie_where_they_were_are_noised_again(family: Family, tmp_path: Path) -> None:
    child, data, settings = noised_descendant(family, tmp_path)
    for request in (ProfileRequest(data=data.path), ProfileRequest(piped_data=data.path)):
        basis, _ = found(child, request)
        assert basis.calibration == settings
        assert basis.data is not None and (basis.data.clean == data.clean).all()
        assert basis.reason.endswith("cfg 1.5, 4 steps, 3 images, noised from data")


def test_classes_of_given_images_are_their_own(family: Family, tmp_path: Path) -> None:
    request = ProfileRequest(data=data_file(tmp_path), wanted=WantedCalibration(classes=(1,)))
    with pytest.raises(UsageError, match="calibration_classes has no effect"):
        search(family.original, request, print)


def test_fewer_of_the_given_images_may_be_asked_for(family: Family, tmp_path: Path) -> None:
    request = ProfileRequest(data=data_file(tmp_path), wanted=WantedCalibration(images=2))
    basis, _ = found(family.original, request)
    assert basis.calibration is not None and basis.calibration.spec.classes == (2, 0)
    assert basis.settings["images"] == 2


def test_settings_are_refused_where_nobody_profiles() -> None:
    ProfileRequest().refuse_settings("quantize")
    with pytest.raises(UsageError, match="calibration_cfg has no effect: quantize takes no profile"):
        ProfileRequest(wanted=WantedCalibration(cfg=2.0)).refuse_settings("quantize")


# distilled checkpoints


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> DistilledPair:
    return distilled_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def teachers_profile(pair: DistilledPair) -> RoutingProfile:
    spec = SampleSpec(images=3, steps=4, cfg=1.5, seed=11, solver="euler", classes=(0, 2))
    path = pair.original.with_name("teacher.profile.safetensors")
    profile = calibrate(open_checkpoint(pair.original), replace(SETTINGS, spec=spec), Run("cpu"), path)
    assert profile is not None
    return profile


def test_a_piped_profile_from_before_the_distilling_is_not_used(
    pair: DistilledPair, teachers_profile: RoutingProfile, tmp_path: Path
) -> None:
    few = open_checkpoint(pair.few)
    for checkpoint in (few, descendant(few, tmp_path / "small.safetensors", (0, 1, 2), None)):
        basis, notes = found(checkpoint, ProfileRequest(teachers_profile.path, is_piped=True))
        assert basis.profile is None and basis.calibration == default_calibration(checkpoint)
        assert basis.reason.startswith(
            "distilled to 4 steps of euler, with guidance 1.5 in its weights: cfg 1, 4 steps"
        )
        name = checkpoint.name
        assert notes == [
            f"{teachers_profile.path}: from before {name} was distilled to 4 steps of euler, with guidance 1.5 in its "
            "weights; its states are others, and it is not used"
        ]


def test_a_given_profile_from_before_the_distilling_is_refused(
    pair: DistilledPair, teachers_profile: RoutingProfile, tmp_path: Path
) -> None:
    few = open_checkpoint(pair.few)
    for checkpoint in (few, descendant(few, tmp_path / "small.safetensors", (0, 1, 2), None)):
        with pytest.raises(BadInputError, match=f"teacher.*is of a checkpoint from before {checkpoint.name} was dist"):
            search(checkpoint, ProfileRequest(teachers_profile.path), print)


def test_settings_since_the_distilling_are_inherited(pair: DistilledPair, tmp_path: Path) -> None:
    few = open_checkpoint(pair.few)
    mine = replace(default_calibration(few), reservoir=24, spec=replace(default_calibration(few).spec, seed=5))
    small = descendant(few, tmp_path / "small.safetensors", (0, 1, 2), mine)
    basis, notes = found(small, ProfileRequest())
    assert (basis.calibration, notes) == (mine, [])


def test_other_calibration_steps_than_its_own_are_warned_of(pair: DistilledPair) -> None:
    basis, notes = found(open_checkpoint(pair.few), ProfileRequest(wanted=WantedCalibration(steps=8)))
    assert basis.settings["steps"] == 8
    assert len(notes) == 1 and notes[0].startswith("warning: few.safetensors: distilled to 4 steps of euler, and ")
