"""Stages that are run twice: what is up to date is reused, and anything else that exists is refused with its reason."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Outcome, contents, here, piped, series
from conftest import make_pico

from ditmoe_cli.compression.plan import parse_plan
from ditmoe_cli.files.workfolder import open_work, work_folder

pytestmark = pytest.mark.usefixtures("few_tokens")

FEW = ("--refit-tokens", 64)
PROFILED = ("--profile", "p.safetensors")
STAGES: dict[str, tuple[object, ...]] = {
    "prune": ("prune", "a.safetensors", "--keep", 2, *FEW, *PROFILED),
    "prune, narrowed": ("prune", "a.safetensors", "--neurons", 0.5, "--multiple", 8, *FEW, *PROFILED),
    "prune by replay": ("prune", "a.safetensors", "--keep", 2, "--router", "auto", *FEW, *PROFILED),
    "prune at random": ("prune", "a.safetensors", "--keep", 2, "--method", "random", "--no-refit"),
    "merge": ("merge", "a.safetensors", "--groups", 2, *FEW, *PROFILED),
    "merge --delta": ("merge", "a.safetensors", "--delta", "svd", *PROFILED),
    "quantize": ("quantize", "a.safetensors", "--bits", 4, "--allow", "2,4,8", "--tokens", 512, *PROFILED),
    "quantize --uniform": ("quantize", "a.safetensors", "--uniform", "--bits", 4),
    "convert": ("convert", "a.safetensors"),
}
MEASURED = ("refit_error", "prediction_error", "top_k_agreement", "predicted_error", "tried_error", "gap")
UNKNOWN = ("seconds", "solver", "bound", "routed_error")  # what only the run that made the output knows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reuse")
    make_pico(sampler="rf", in_channels=1, hidden=64).save(folder / "a.safetensors")
    words = ("profile-experts", "a.safetensors", "--images", 4, "--steps", 2, "--bins", 2, "-o", "p.safetensors")
    assert here(*words, cwd=folder).code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


def same_results(again: Outcome, first: Outcome) -> None:
    """The envelope and result of the run that made the output; errors as its history holds them, in four digits."""
    one, two = dict(first.envelope), dict(again.envelope)
    before, after = one.pop("result"), two.pop("result")
    assert after.pop("up_to_date") is True
    for name in MEASURED:
        assert (name in after) == (name in before)
        if name in after:
            assert after.pop(name) == pytest.approx(before.pop(name), rel=1e-3)
    assert after == {name: value for name, value in before.items() if name not in UNKNOWN}
    figures = {*MEASURED, *UNKNOWN}
    for envelope in (one, two):
        last = envelope["history"][-1]
        last["options"] = {name: value for name, value in last["options"].items() if name not in figures}
    assert two == one


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_run_again_is_up_to_date(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*STAGES[name], "-o", "x.safetensors")
    first = here(*words, cwd=folder)
    before = contents(folder)
    monkeypatch.setattr("ditmoe_cli.api.planner_runs.carry_out", lambda *_: pytest.fail("carried out again"))
    again = here(*words, cwd=folder)
    same_results(again, first)
    assert f"ditmoe: {folder / 'x.safetensors'} is up to date" in again.notes
    assert contents(folder) == before
    leftover = work_folder(folder / "x.safetensors")
    with suppress(KeyboardInterrupt), open_work(folder / "x.safetensors", "another request", print) as work:
        work.write("piece", {"x": torch.zeros(1)})
        raise KeyboardInterrupt
    dry = here(*words, "--dry-run", cwd=folder)
    assert dry.code == 0 and f"ditmoe: {folder / 'x.safetensors'} is up to date" in dry.notes
    assert dry.result == {**again.result, "dry_run": True} and leftover.is_dir(), "writes and deletes nothing"
    shutil.rmtree(leftover)
    assert contents(folder) == before
    quiet = here(*words, "-q", cwd=folder)
    assert quiet.out.strip() == str(folder / "x.safetensors")


def test_a_dry_run_refuses_what_is_not_up_to_date(folder: Path) -> None:
    words = (*STAGES["prune at random"], "-o", "x.safetensors", "--dry-run")
    shutil.copy(folder / "a.safetensors", folder / "x.safetensors")
    assert "exists already" in here(*words, cwd=folder).error(5)
    assert "up_to_date" not in here(*words, "--force", cwd=folder).result


def test_dry_runs_of_applying_and_of_files_for_upstream_tell_it_too(folder: Path) -> None:
    (folder / "plan.json").write_text(here(*STAGES["prune"], "--dry-run", cwd=folder).out)
    apply = ("apply", "a.safetensors", "--plan", "plan.json", *PROFILED, "-o", "x.safetensors")
    upstream = ("export", "a.safetensors", "--to", "upstream", "-o", "a.pt")
    for words in (apply, upstream):
        assert "up_to_date" not in here(*words, "--dry-run", cwd=folder).result
        here(*words, cwd=folder)
        dry = here(*words, "--dry-run", cwd=folder)
        assert dry.code == 0 and dry.result["up_to_date"] and dry.result["dry_run"] and "is up to date" in dry.err


def test_a_plan_that_is_applied_again_is_up_to_date(folder: Path) -> None:
    (folder / "plan.json").write_text(here(*STAGES["prune"], "--dry-run", cwd=folder).out)
    apply = ("apply", "a.safetensors", "--plan", "plan.json", *PROFILED, "-o", "x.safetensors")
    first = here(*apply, cwd=folder)
    again = here(*apply, cwd=folder)
    assert "is up to date" in again.err and again.result["plan_digest"] == first.result["plan_digest"]
    planned = here(*STAGES["prune"], "-o", "x.safetensors", cwd=folder)
    assert "is up to date" in planned.err, "the plan's result is that of the command that planned it"


def test_an_edited_plan_makes_no_result_of_the_planner(folder: Path) -> None:
    document = here(*STAGES["prune at random"], "--dry-run", cwd=folder).result["plan"]
    document["blocks"][0]["keep"] = [0, 3] if document["blocks"][0]["keep"] != [0, 3] else [0, 2]
    (folder / "plan.json").write_text(json.dumps(document))
    apply = ("apply", "a.safetensors", "--plan", "plan.json", "-o", "x.safetensors")
    assert here(*apply, cwd=folder).code == 0
    assert "is up to date" in here(*apply, cwd=folder).err
    assert "another request" in here(*STAGES["prune at random"], "-o", "x.safetensors", cwd=folder).error(5)


@pytest.mark.parametrize("name", ["prune at random", "quantize --uniform", "convert"])
def test_a_folder_is_up_to_date_in_the_same_layout_only(name: str, folder: Path) -> None:
    words = (*STAGES[name], "-o", "out", "--max-shard-size", "50KB")
    first = here(*words, cwd=folder)
    same_results(here(*words, cwd=folder), first)
    message = here(*STAGES[name], "-o", "out", "--max-shard-size", "70KB", cwd=folder).error(5)
    assert "is laid out in other files" in message


def test_force_does_the_work_anew(folder: Path) -> None:
    words = (*STAGES["prune"], "-o", "x.safetensors")
    first = here(*words, cwd=folder)
    before = (folder / "x.safetensors").stat().st_ino
    again = here(*words, "--force", cwd=folder)
    assert "up to date" not in again.err and again.result["refit_error"] == first.result["refit_error"]
    assert (folder / "x.safetensors").stat().st_ino != before


OTHERS: dict[str, tuple[tuple[object, ...], str]] = {
    "another ratio": (("prune", "a.safetensors", "--keep", 3, *FEW, *PROFILED), "prune --keep 2 --method reap"),
    "another method": (("prune", "a.safetensors", "--keep", 2, "--method", "random", "--no-refit"), "--method reap"),
    "another command": (("merge", "a.safetensors", "--groups", 2, *FEW, *PROFILED), "another request: prune"),
    "another profile": (("prune", "a.safetensors", "--keep", 2, *FEW, "--profile", "q.safetensors"), "request: prune"),
    "another input": (
        ("prune", "b.safetensors", "--keep", 2, "--method", "random", "--no-refit"),
        "made from another input",
    ),
    "a copy": (("convert", "a.safetensors"), "is no copy of this input"),
}


def test_what_was_made_by_another_request_is_refused_with_it(folder: Path) -> None:
    make_pico(sampler="rf", in_channels=1, seed=1).save(folder / "b.safetensors")
    words = ("profile-experts", "a.safetensors", "--images", 4, "--steps", 4, "--bins", 2, "-o", "q.safetensors")
    assert here(*words, cwd=folder).code == 0
    assert here(*STAGES["prune"], "-o", "x.safetensors", cwd=folder).code == 0
    before = contents(folder)
    for name, (other, said) in OTHERS.items():
        message = here(*other, "-o", "x.safetensors", cwd=folder).error(5)
        assert said in message and "--force" in message, name
        assert contents(folder) == before, name


def test_another_version_is_another_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*STAGES["prune at random"], "-o", "x.safetensors")
    assert here(*words, cwd=folder).code == 0
    monkeypatch.setattr("ditmoe_cli.compression.planner.__version__", "another")
    assert "another request" in here(*words, cwd=folder).error(5)


def cut(data: bytes) -> bytes:
    return data[:-1]


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def other(data: bytes) -> bytes:
    return b"mine" + data


@pytest.mark.parametrize("damage", [cut, flip, other])
@pytest.mark.parametrize("name", ["prune at random", "convert"])
def test_a_damaged_output_is_not_up_to_date(name: str, damage: Any, folder: Path) -> None:
    words = (*STAGES[name], "-o", "x.safetensors")
    assert here(*words, cwd=folder).code == 0
    file = folder / "x.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    before = contents(folder)
    assert "exists already" in here(*words, cwd=folder).error(5)
    assert contents(folder) == before


def test_it_takes_neither_torch_nor_the_device(folder: Path) -> None:
    words = {name: (*STAGES[name], "-o", f"{name}.safetensors") for name in ("prune", "quantize", "merge", "convert")}
    for each in words.values():
        assert here(*each, cwd=folder).code == 0
    for outcome, heavy in series(list(words.values()), folder):
        assert "is up to date" in outcome.err and outcome.code == 0
        assert not {"torch", "numpy"} & set(heavy)


def test_a_pipeline_that_is_run_again_repeats_only_what_failed(folder: Path) -> None:
    line = (
        "ditmoe profile-experts a.safetensors --images 4 --steps 2 --bins 2 | "
        "ditmoe prune --keep 2 --refit-tokens 64 | ditmoe quantize --bits 4 --allow 2,4,8 --tokens 512 | ditmoe inspect"
    )
    first = piped(line, folder)
    assert first.code == 0, first.err
    (quantised,) = folder.glob("*quantize*.safetensors")
    whole = quantised.read_bytes()
    again = piped(line, folder)
    assert again.err.count("is up to date") == 3 and again.result == first.result
    quantised.unlink()
    repaired = piped(line, folder)
    assert repaired.err.count("is up to date") == 2
    assert quantised.read_bytes() == whole


def test_another_profile_of_the_same_settings_is_another_request(folder: Path) -> None:
    words = (*STAGES["prune by replay"], "-o", "x.safetensors")
    assert here(*words, cwd=folder).code == 0
    profile = folder / "p.safetensors"
    profile.write_bytes(flip(profile.read_bytes()))
    assert "with another profile of the same settings: prune --keep 2" in here(*words, cwd=folder).error(5)


def test_a_profile_that_planning_made_is_up_to_date_as_one_that_is_found(folder: Path) -> None:
    words = ("prune", "a.safetensors", "--keep", 2, *FEW, "--calibration-images", 4, "--calibration-steps", 2)
    assert here(*words, "-o", "x.safetensors", cwd=folder).code == 0
    assert "is up to date" in here(*words, "-o", "x.safetensors", cwd=folder).err
    for profile in folder.glob("a.*.profile.safetensors"):
        profile.unlink()
    again = here(*words, "-o", "x.safetensors", cwd=folder)
    assert "is up to date" in again.err and "profiling" not in again.err


def replanned(folder: Path, signed: bool) -> None:
    """Write another choice for the same request as plan.json, signed by a planner or by nobody."""
    document = here(*STAGES["prune at random"], "--dry-run", cwd=folder).result["plan"]
    document["blocks"][0]["keep"] = [0, 3] if document["blocks"][0]["keep"] != [0, 3] else [0, 2]
    del document["digest"]
    if signed:
        document["digest"] = parse_plan(document, "plan").digest
    (folder / "plan.json").write_text(json.dumps(document))


def test_another_plan_for_the_same_request_is_carried_out_elsewhere(folder: Path) -> None:
    assert here(*STAGES["prune at random"], "-o", "x.safetensors", cwd=folder).code == 0
    replanned(folder, signed=True)
    apply = ("apply", "a.safetensors", "--plan", "plan.json")
    assert "another request" in here(*apply, "-o", "x.safetensors", cwd=folder).error(5)
    for _ in range(2):
        again = here(*apply, "-o", "y.safetensors", cwd=folder)
    assert "is up to date" in again.err


def test_a_plan_that_nobody_signed_answers_no_request_of_a_planner(folder: Path) -> None:
    replanned(folder, signed=False)
    assert here("apply", "a.safetensors", "--plan", "plan.json", "-o", "x.safetensors", cwd=folder).code == 0
    assert "another request" in here(*STAGES["prune at random"], "-o", "x.safetensors", cwd=folder).error(5)
