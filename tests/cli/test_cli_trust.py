"""What a file may not do, and what must not be compared or overwritten unasked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Outcome, here
from conftest import make_pico

from ditmoe_cli.compression.methods import METHODS
from ditmoe_cli.diffusion.noise import image_seed
from ditmoe_cli.files.provenance import Card, Provenance

SETTINGS = ("--images", 4, "--steps", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    make_pico(sampler="rf", in_channels=1).save(folder / "a.safetensors")
    assert here("sample", "a.safetensors", *SETTINGS, "-o", "s.safetensors", cwd=folder).code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


def refused(outcome: Outcome, code: int, *words: str) -> None:
    lines = outcome.err.strip().splitlines()
    assert outcome.code == code, outcome.err
    assert lines[-1].startswith("ditmoe: error: ") and "internal error" not in lines[-1]
    assert all(word in lines[-1] for word in words), lines[-1]


def test_metadata_cannot_name_code_to_run(folder: Path) -> None:
    (folder / "evil.py").write_text("open('ran', 'w')\ndef factory():\n    return None\n")
    pico = make_pico(sampler="rf", in_channels=1)
    pico.save(folder / "evil.safetensors", provenance=Provenance(pico.config.to_json(), card=Card("evil:factory")))
    outcome = here("fid", "evil.safetensors", "--ref", "a.safetensors", *SETTINGS, cwd=folder)
    refused(outcome, 3, "evil:factory", "--extractor")
    assert not (folder / "ran").exists()


def test_samples_are_named_as_samples(folder: Path) -> None:
    envelope = here("fid", "s.safetensors", "--ref", "a.safetensors", cwd=folder).envelope
    assert (envelope["checkpoint"], envelope["samples"]) == (None, str(folder / "s.safetensors"))


def test_samples_of_other_settings_are_compared_only_when_asked(folder: Path) -> None:
    words = ("fid", "a.safetensors", "--ref", "s.safetensors", "--images", 4)
    refused(here(*words, "--steps", 3, "--cfg", 2, cwd=folder), 3, "s.safetensors", "steps 2 there, 3 here", "cfg")
    asked = here(*words, "--steps", 3, "--cfg", 2, "--anyway", cwd=folder)
    assert asked.code == 0 and asked.result["paired"] is None
    other_seed = here(*words, "--steps", 2, "--seed", 5, cwd=folder)
    assert other_seed.code == 0 and other_seed.result["frechet"] > 0 and other_seed.result["paired"] is None
    same = here(*words, "--steps", 2, cwd=folder)
    assert same.result["frechet"] == 0 and same.result["paired"]["mse"] == 0


def test_an_inspected_checkpoint_scores_zero_in_a_pipe(folder: Path) -> None:
    inspected = here("inspect", "a.safetensors", cwd=folder)
    scored = here("fid", *SETTINGS, cwd=folder, stdin=inspected.out)
    assert scored.code == 0 and scored.result["frechet"] == 0 and scored.result["paired"]["mse"] == 0


def test_calibration_data_and_weights_are_inputs_too(folder: Path) -> None:
    before = (folder / "s.safetensors").read_bytes()
    words = ("profile-experts", "a.safetensors", "--data", "s.safetensors", *SETTINGS, "--bins", 2)
    refused(here(*words, "-o", "s.safetensors", "--force", cwd=folder), 5, "input itself")
    scoring = ("fid", "a.safetensors", "--ref", "a.safetensors", "--weights", "s.safetensors", *SETTINGS)
    refused(here(*scoring, "-o", "s.safetensors", "--force", cwd=folder), 5, "input itself")
    assert (folder / "s.safetensors").read_bytes() == before


def test_calibrating_on_data_is_recorded_and_repeated(folder: Path) -> None:
    words = ("profile-experts", "a.safetensors", "--data", "s.safetensors", *SETTINGS, "--bins", 2)
    outcome = here(*words, cwd=folder)
    assert outcome.code == 0
    assert outcome.result["calibration"]["source"] == "data"
    refused(here(*words, "--classes", "0,1", "--force", cwd=folder), 2, "--classes")
    pruned = here("prune", "--keep", "2", cwd=folder, stdin=outcome.out)
    assert pruned.code == 0, pruned.err
    words = ("prune", "a.prune-keep2.safetensors", "--keep", "2", "-o", "again.safetensors")
    refused(here(*words, cwd=folder), 3, "--calibration-data", outcome.result["calibration"]["data"][:12])
    again = here("prune", "--keep", "2", "-o", "again.safetensors", cwd=folder, stdin=pruned.out)  # which names them
    assert again.code == 0 and "as the profile of its ancestor" in again.err and "noised from data" in again.err


def test_each_image_is_stored_with_the_seed_of_its_noise(folder: Path) -> None:
    from safetensors.numpy import load_file

    seeds = load_file(folder / "s.safetensors")["seed"]
    np.testing.assert_array_equal(seeds, [image_seed(0, i) for i in range(4)])


def test_an_edited_plan_cannot_choose_where_to_write(folder: Path) -> None:
    planned = here("quantize", "a.safetensors", "--uniform", "--bits", 4, "--dry-run", cwd=folder).result["plan"]
    (folder / "plan.json").write_text(json.dumps({**planned, "command": "/../../escaped"}))
    refused(here("apply", "a.safetensors", "--plan", "plan.json", cwd=folder), 3, "'command'")


def test_an_open_plan_is_named_as_such(folder: Path) -> None:
    opened = here("prune", "a.safetensors", "--keep", 2, "--dry-run", cwd=folder)
    assert opened.result["plan"] is None
    (folder / "plan.json").write_text(opened.out)
    refused(here("apply", "a.safetensors", "--plan", "plan.json", cwd=folder), 3, "--profile")


def test_a_dry_run_refuses_what_writing_would(folder: Path) -> None:
    words = ("convert", "a.safetensors", "--dry-run")
    refused(here(*words, "-o", "absent/x.safetensors", cwd=folder), 3, "no such folder")
    refused(here(*words, "-o", "s.safetensors", cwd=folder), 5, "exists already")
    refused(here(*words, "-o", "x.safetensor", cwd=folder), 2, "x.safetensor")


@pytest.mark.parametrize(
    ("text", "said"), [("[" * 200_000, "not JSON"), ('{"schema": "\udcff"', "not JSON")], ids=["deep", "bytes"]
)
def test_hostile_envelopes(folder: Path, text: str, said: str) -> None:
    refused(here("inspect", cwd=folder, stdin=text.encode(errors="surrogateescape").decode("latin-1")), 3, said)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("inspect", "x" * 300), 3),
        (("sample", "a.safetensors", "--device", "meta"), 2),
    ],
    ids=["long name", "meta device"],
)
def test_odd_values(folder: Path, words: tuple[object, ...], code: int) -> None:
    refused(here(*words, cwd=folder), code)


@pytest.mark.parametrize("card", [{"extractor": "pixels", "grey_levels": "x"}, {"extractor": 3, "grey_levels": 255}])
def test_a_malformed_card_is_refused(folder: Path, card: dict[str, object]) -> None:
    pico = make_pico(sampler="rf", in_channels=1)
    pico.save(folder / "b.safetensors", provenance=Provenance(pico.config.to_json(), card=Card(**card)))  # type: ignore[arg-type]
    refused(here("inspect", "b.safetensors", cwd=folder), 3, "b.safetensors", "card")


def test_methods_and_plans_are_envelopes(folder: Path) -> None:
    methods = METHODS
    for command, known in methods.items():
        listed = here(command, "--list-methods", cwd=folder).result["methods"]
        assert listed == {name: {"summary": known[name].summary, "source": known[name].source} for name in known}
    planned = here("quantize", "a.safetensors", "--uniform", "--bits", 8, "--dry-run", cwd=folder)
    (folder / "plan.json").write_text(planned.out)
    shown = here("plan", "plan.json", cwd=folder)
    assert shown.result["plan"] == planned.result["plan"]
    assert here("plan", "plan.json", "plan.json", cwd=folder).result["same"]
