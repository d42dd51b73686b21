"""``profile-experts`` run again, and the profile that planners find or make with settings of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import contents, here, series
from compressing import measure_few_tokens
from conftest import make_pico

from ditmoe_cli.files.reader import open_reader
from ditmoe_cli.routing.profile import read_profile

SETTINGS = ("--images", 4, "--steps", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pixel checkpoint in a folder of its own, and its profile under the usual name; not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "models").mkdir()
    make_pico(sampler="rf", in_channels=1).save(folder / "models" / "a.safetensors")
    assert here("profile-experts", "models/a.safetensors", *SETTINGS, "--cfg", 1.5, cwd=folder).code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of `made`."""
    return Path(shutil.copytree(made, tmp_path / "folder"))


def calibrations(path: Path) -> list[object]:
    """The calibration settings in the history of a checkpoint."""
    provenance = open_reader(path)[0].provenance
    assert provenance is not None
    return [step.calibration for step in provenance.history]


def test_bins_follow_the_steps(made: Path, tmp_path: Path) -> None:
    told = here("profile-experts", made / "models/a.safetensors", "--images", 2, "--steps", 5, cwd=tmp_path)
    assert told.result["calibration"]["bins"] == 5
    words = ("profile-experts", made / "models/a.safetensors", "--steps", 4, "--bins", 5, "-o", "b.safetensors")
    assert here(*words, cwd=tmp_path).error(2).startswith("--bins 5: must be between 1 and the 4 steps")


def test_labels_are_evenly_spread_where_there_are_more_classes_than_images(tmp_path: Path) -> None:
    make_pico(sampler="rf", in_channels=1, num_classes=50).save(tmp_path / "a.safetensors")
    settings = ("profile-experts", "a.safetensors", "--images", 5, "--steps", 2, "-o", "p.safetensors")
    told = here(*settings, cwd=tmp_path)
    assert told.result["calibration"]["classes"] == [0, 10, 20, 30, 40]
    labels = read_profile(tmp_path / "p.safetensors").tensor("states.label")
    assert set(labels.tolist()) == {0, 10, 20, 30, 40}
    chosen = here(*settings, "--classes", "0-4", "--force", cwd=tmp_path)
    assert chosen.result["calibration"]["classes"] == "0-4"
    fewer = ("--keep", 2, "--no-refit", "--calibration-images", 2, "--calibration-steps", 2)
    (settings,) = calibrations(here("prune", "a.safetensors", *fewer, cwd=tmp_path).path)
    assert isinstance(settings, dict) and settings["classes"] == [0, 25]


def test_a_profile_that_exists_is_up_to_date_and_loads_neither_torch_nor_numpy(folder: Path) -> None:
    before = contents(folder)
    words = ("profile-experts", "models/a.safetensors", *SETTINGS, "--cfg", 1.5)
    ((again, heavy),) = series([words], cwd=folder)
    assert heavy == []
    assert again.notes[-1].endswith("a.profile.safetensors is up to date")
    assert contents(folder) == before
    forced = here(*words, "--force", cwd=folder)
    assert forced.envelope == again.envelope
    assert contents(folder) == before


def test_a_profile_of_other_settings_or_weights_is_no_output_to_replace(folder: Path) -> None:
    refused = here("profile-experts", "models/a.safetensors", *SETTINGS, cwd=folder).error(5)
    assert "exists already, a profile made with cfg 1.5, not 1.0; give --force" in refused
    (folder / "models" / "a.safetensors").unlink()
    make_pico(sampler="rf", in_channels=1, seed=4).save(folder / "models" / "a.safetensors")
    refused = here("profile-experts", "models/a.safetensors", *SETTINGS, "--cfg", 1.5, cwd=folder).error(5)
    assert "a profile of another checkpoint" in refused


@pytest.mark.parametrize("where", [".", "models"])
def test_planners_find_the_profile_in_the_working_folder_and_beside_the_checkpoint(where: str, folder: Path) -> None:
    profile = folder / "a.profile.safetensors"
    if where != ".":
        profile = profile.rename(folder / where / profile.name)
    plan = here("prune", "models/a.safetensors", "--keep", 2, "--no-refit", "--dry-run", cwd=folder)
    assert f"ditmoe: using the profile {profile} (cfg 1.5, 2 steps, 4 images)" in plan.notes
    assert plan.result["plan"]["calibration"]["cfg"] == 1.5
    pruned = here("prune", "models/a.safetensors", "--keep", 2, "--no-refit", cwd=folder)
    assert pruned.envelope["profile"] == str(profile)
    assert pruned.result["bytes"] == plan.result["bytes"]


def test_a_descendant_named_by_its_file_alone_is_profiled_as_its_ancestor(folder: Path) -> None:
    pruned = here("prune", "models/a.safetensors", "--keep", 3, "--no-refit", cwd=folder)
    (settings,) = calibrations(pruned.path)
    words = ("prune", pruned.path, "--keep", 2, "--no-refit")
    planned = here(*words, "--dry-run", cwd=folder)
    again = here(*words, cwd=folder)
    (note,) = [note for note in again.notes if "profiling" in note]
    assert note.endswith("as the profile of its ancestor: cfg 1.5, 2 steps, 4 images")
    assert planned.result["bytes"] == again.result["bytes"], "predicted without a profile"
    assert calibrations(again.path) == [settings, settings]
    inherited = json.loads(json.dumps(settings))
    assert inherited["cfg"] == 1.5 and inherited["bins"] == 2


def test_planners_profile_as_they_are_told(folder: Path) -> None:
    (folder / "a.profile.safetensors").unlink()
    options = ("--calibration-cfg", 2, "--calibration-steps", 3, "--calibration-images", 2, "--calibration-seed", 7)
    words = ("prune", "models/a.safetensors", "--keep", 2, "--no-refit", *options, "--calibration-classes", "1,2")
    planned = here(*words, "--dry-run", cwd=folder)
    pruned = here(*words, cwd=folder)
    assert any(note.endswith("cfg 2, 3 steps, 2 images") for note in pruned.notes)
    assert planned.result["bytes"] == pruned.result["bytes"]
    (settings,) = calibrations(pruned.path)
    assert isinstance(settings, dict)
    asked = {"cfg": 2.0, "steps": 3, "images": 2, "seed": 7, "classes": [1, 2], "bins": 3}
    assert asked.items() <= settings.items()


def test_settings_beside_a_profile_that_was_made_otherwise_are_refused(folder: Path) -> None:
    words = ("prune", "models/a.safetensors", "--keep", 2, "--profile", "a.profile.safetensors", "--calibration-cfg")
    refused = here(*words, 4, cwd=folder).error(2)
    assert refused.startswith("--calibration-cfg 4.0: the profile was made with 1.5 (")
    assert here(*words, 1.5, "--dry-run", cwd=folder).code == 0
    uniform = ("quantize", "models/a.safetensors", "--uniform", "--bits", 4, "--calibration-cfg", 4)
    assert here(*uniform, cwd=folder).error(2).startswith("--calibration-cfg has no effect")


def test_given_images_are_found_again_through_a_pipe_and_asked_for_without(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 1)).astype(np.uint8)
    np.savez(folder / "images.npz", arr_0=pixels, labels=np.array([0, 1, 2, 0]))
    noised = ("profile-experts", "models/a.safetensors", *SETTINGS, "--data", "images.npz", "-o", "d.safetensors")
    profiled = here(*noised, cwd=folder)
    pruned = here("prune", "--keep", 3, "--no-refit", cwd=folder, stdin=profiled.out)
    twice = here("prune", "--keep", 2, "--no-refit", cwd=folder, stdin=pruned.out)
    assert any("as the profile of its ancestor" in note and "noised from data" in note for note in twice.notes)
    words = ("prune", pruned.path, "--keep", 2, "--no-refit", "-o", "again.safetensors")
    Path(twice.envelope["profile"]).unlink()
    assert "give them as --calibration-data" in here(*words, cwd=folder).error(3)
    again = here(*words, "--calibration-data", "images.npz", cwd=folder)
    assert again.path.read_bytes() == twice.path.read_bytes()


def test_apply_and_report_find_the_profile_under_its_usual_name(folder: Path) -> None:
    words = ("prune", "models/a.safetensors", "--keep", 2, "--refit-tokens", 64)
    (folder / "plan.json").write_text(here(*words, "--dry-run", cwd=folder).out)
    applied = here("apply", "models/a.safetensors", "--plan", "plan.json", "-o", "applied.safetensors", cwd=folder)
    assert any("a.profile.safetensors, which the plan was made with" in note for note in applied.notes)
    inspected = here("inspect", "models/a.safetensors", cwd=folder)
    reported = here("report", "profile", "--replicates", 20, cwd=folder, stdin=inspected.out)
    assert reported.envelope["profile"] == str(folder / "a.profile.safetensors")
    (folder / "a.profile.safetensors").unlink()
    refused = here("report", "profile", cwd=folder, stdin=inspected.out).error(3)
    assert "the envelope names no profile" in refused


@pytest.mark.slow
def test_what_a_plan_measured_serves_the_next_budget(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_few_tokens(monkeypatch, 512)
    words = ("quantize", "models/a.safetensors", "--rounding", "nearest", "--group-size", 32)
    here(*words, "--bits", 4, "-o", "first.safetensors", cwd=folder)
    second = here(*words, "--bits", 3, "-o", "second.safetensors", cwd=folder)
    assert f"ditmoe: using the errors of formats kept in {folder / 'a.profile.measured.json'}" in second.notes
    (folder / "a.profile.measured.json").unlink()
    anew = here(*words, "--bits", 3, "-o", "anew.safetensors", cwd=folder)
    assert anew.path.read_bytes() == second.path.read_bytes()
