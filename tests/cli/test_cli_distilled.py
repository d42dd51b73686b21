"""What commands do with a distilled checkpoint: its own steps, no guidance, and its metadata in all that it becomes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_helpers import Outcome, here
from conftest import make_pico
from distilling import FOUR, DistilledPair, distilled_pair, moved, save_distilled

from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.routing.profile import read_profile

TOLD = "few.safetensors: distilled to 4 steps of euler, with guidance 1.5 in its weights"
OTHERS = "warning: few.safetensors: distilled to 4 steps of euler, and sampled by "


@pytest.fixture
def pair(tmp_path: Path) -> DistilledPair:
    return distilled_pair(tmp_path)


def notes_of(outcome: Outcome, word: str = "distilled to") -> list[str]:
    return [line.removeprefix("ditmoe: ") for line in outcome.notes if word in line]


# sample and profile-experts


def test_samples_are_of_its_own_steps_and_that_is_said_once(pair: DistilledPair, tmp_path: Path) -> None:
    few = here("sample", pair.few, "--images", 3, cwd=tmp_path)
    assert (few.result["spec"]["solver"], few.result["spec"]["steps"], few.result["nfe"]) == ("euler", 4, 4)
    assert notes_of(few) == [f"{TOLD}; sampling so"]
    assert Path(few.envelope["samples"]).name == "few.samples-images3.safetensors"
    named = here(
        "sample",
        "few.safetensors",
        "--images",
        3,
        "--steps",
        4,
        "--solver",
        "euler",
        "-o",
        "x.safetensors",
        cwd=tmp_path,
    )
    assert Path(named.envelope["samples"]).read_bytes() == Path(few.envelope["samples"]).read_bytes()
    original = here("sample", "original.safetensors", "--images", 3, cwd=tmp_path)
    assert (original.result["spec"]["steps"], notes_of(original)) == (16, [])


def test_other_steps_are_sampled_with_a_warning(pair: DistilledPair, tmp_path: Path) -> None:
    few = here("sample", pair.few, "--images", 2, "--steps", 8, cwd=tmp_path)
    assert (few.result["spec"]["solver"], few.result["spec"]["steps"]) == ("euler", 8)
    [warning] = notes_of(few)
    assert warning.startswith(f"{OTHERS}8 steps of euler: ") and "distill again" in warning
    assert Path(few.envelope["samples"]).name == "few.samples-images2-steps8.safetensors"


@pytest.mark.parametrize("command", ["sample", "profile-experts", "fid", "compare"])
def test_guidance_and_upstreams_steps_are_refused(command: str, pair: DistilledPair, tmp_path: Path) -> None:
    named = {"fid": ("--ref", "original.safetensors"), "compare": ("few.safetensors",)}.get(command, ())
    said = here(command, pair.few, *named, "--cfg", 1.5, cwd=tmp_path).error(2)
    assert said.startswith("--cfg 1.5: few.safetensors was distilled to 4 steps of euler, with guidance 1.5 in its w")
    if command != "profile-experts":
        said = here(command, pair.few, *named, "--upstream-exact", cwd=tmp_path).error(2)
        assert said.startswith("--upstream-exact: few.safetensors was distilled to 4 steps of euler")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.safetensors", "original.safetensors"]


def test_a_guidance_interval_is_refused(pair: DistilledPair, tmp_path: Path) -> None:
    said = here("sample", pair.few, "--cfg-interval", "0.2,0.8", cwd=tmp_path).error(2)
    assert said.startswith("--cfg-interval 0.2,0.8: few.safetensors was distilled")


def test_a_profile_is_of_its_own_steps_in_as_many_bins(pair: DistilledPair, tmp_path: Path) -> None:
    few = here("profile-experts", pair.few, cwd=tmp_path)
    run = read_profile(Path(few.envelope["profile"])).calibration
    assert (run["solver"], run["steps"], run["bins"], run["cfg"]) == ("euler", 4, 4, 1.0)
    assert run["images"] == 320, "as many evaluations as 64 images in 20 steps"
    assert notes_of(few) == [f"{TOLD}; sampling so"]
    other = here("profile-experts", pair.few, "--steps", 6, "--images", 2, "-o", "x.safetensors", cwd=tmp_path)
    assert notes_of(other)[0].startswith(OTHERS)


# every command that writes a checkpoint

WRITING = {
    "prune": ("prune", "--keep", 0.5, "--calibration-images", 4),
    "narrow": ("prune", "--neurons", 0.5, "--calibration-images", 4),
    "merge": ("merge", "--groups", 2, "--calibration-images", 4),
    "quantize": ("quantize", "--bits", 8, "--uniform", "--rounding", "nearest"),
    "convert": ("convert", "--dtype", "bf16"),
    "compress": ("compress", "--ratio", 0.6, "--calibration-images", 16),
}


@pytest.mark.parametrize("command", WRITING)
def test_what_is_made_from_it_is_sampled_as_it_is(command: str, pair: DistilledPair, tmp_path: Path) -> None:
    name, *options = WRITING[command]
    made = here(name, pair.few, *options, "-o", "made.safetensors", cwd=tmp_path)
    assert open_checkpoint(made.path).distilled == FOUR
    assert open_checkpoint(made.path).teachers == open_checkpoint(pair.few).teachers
    again = here("sample", "made.safetensors", "--images", 2, cwd=tmp_path)
    assert again.result["nfe"] == 4


def test_a_plan_that_is_applied_keeps_the_steps(pair: DistilledPair, tmp_path: Path) -> None:
    planned = here("quantize", pair.few, "--bits", 8, "--uniform", "--rounding", "nearest", "--dry-run", cwd=tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(planned.result["plan"]))
    made = here("apply", pair.few, "--plan", "plan.json", "-o", "made.safetensors", cwd=tmp_path)
    assert open_checkpoint(made.path).distilled == FOUR


def test_shards_keep_the_steps(pair: DistilledPair, tmp_path: Path) -> None:
    here("convert", pair.few, "-o", "shards", "--max-shard-size", "20kB", cwd=tmp_path)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert open_checkpoint(tmp_path / "shards").distilled == FOUR


def test_a_file_for_upstream_is_told_to_be_sampled_otherwise(pair: DistilledPair, tmp_path: Path) -> None:
    made = here("convert", pair.few, "--to-upstream", "-o", "few.pt", cwd=tmp_path)
    assert any("do not say that it was distilled to 4 steps of euler" in line for line in made.notes)
    assert made.result["upstream"]["sample"] is None and "4 steps of euler" in made.result["upstream"]["no_sample"]


def test_planners_profile_it_by_its_own_steps_whatever_the_pipe_has(pair: DistilledPair, tmp_path: Path) -> None:
    profiled = here("profile-experts", "original.safetensors", "--images", 2, "--steps", 3, cwd=tmp_path)
    envelope = {**profiled.envelope, "checkpoint": str(pair.few)}
    made = here("prune", "--keep", 0.5, "--calibration-images", 4, cwd=tmp_path, stdin=json.dumps(envelope))
    assert any("was distilled to 4 steps" in line and "not used" in line for line in made.notes)
    run = read_profile(Path(made.envelope["profile"])).calibration
    assert (run["solver"], run["steps"], run["bins"]) == ("euler", 4, 4)
    refused = here(
        "prune", "few.safetensors", "--keep", 0.5, "--profile", profiled.envelope["profile"], "--force", cwd=tmp_path
    )
    assert "is of a checkpoint from before few.safetensors was distilled" in refused.error(3)


# inspect


def test_inspect_says_how_it_was_distilled(pair: DistilledPair, tmp_path: Path) -> None:
    few = here("inspect", pair.few, "--json", cwd=tmp_path).result["distilled"]
    assert few["solver"] == "euler" and few["steps"] == 4 and few["cfg"] == 1.5 and few["teacher_steps"] == 16
    text = here("inspect", pair.few, "--text", cwd=tmp_path).out
    assert "distilled" in text and "to 4 steps of euler, with guidance 1.5 in its weights, from 16 of ab2" in text
    original = here("inspect", "original.safetensors", cwd=tmp_path)
    assert "distilled" not in original.result


def test_two_that_are_sampled_otherwise_differ(pair: DistilledPair, tmp_path: Path) -> None:
    found = here("inspect", pair.original, pair.few, cwd=tmp_path).result
    assert found["configuration"]["distilled"]["a"] is None
    assert found["configuration"]["distilled"]["b"]["steps"] == 4
    text = here("inspect", pair.original, pair.few, "--text", cwd=tmp_path).out
    assert "no | 4 steps of euler, with guidance 1.5 in its weights" in text
    few = save_distilled(
        moved(make_pico(sampler="rf", hidden=16, input_size=4, in_channels=1, seed=3)),
        tmp_path / "again.safetensors",
        "0" * 64,
    )
    same = here("inspect", pair.few, few.name, cwd=tmp_path).result
    assert same["same"] and "distilled" not in same["configuration"]
