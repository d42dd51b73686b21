"""What commands do with a distilled checkpoint: its own steps, no guidance, and its metadata in all that it becomes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import slow_but
from cli_helpers import Outcome, here
from conftest import make_pico
from distilling import FOUR, SMALL, DistilledPair, distilled_pair, moved, save_distilled
from healing import heal_on_few_states

from ditmoe_cli.compression.training.teacher_states import NoisedImages
from ditmoe_cli.evaluation.images import read_images
from ditmoe_cli.evaluation.scores.paired_error import paired_error
from ditmoe_cli.files.header import read_safetensors_header
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.routing.profile import read_profile

pytestmark = pytest.mark.usefixtures("few_tokens")

TOLD = "few.safetensors: distilled to 4 steps of euler, with guidance 1.5 in its weights"
OTHERS = "warning: few.safetensors: distilled to 4 steps of euler, and sampled by "


@pytest.fixture
def pair(tmp_path: Path) -> DistilledPair:
    return distilled_pair(tmp_path)


def read_header(path: Path) -> dict[str, Any]:
    """What a file of ours says of itself."""
    document: dict[str, Any] = json.loads(read_safetensors_header(path).metadata["ditmoe"])
    return document


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


@pytest.mark.parametrize(
    "command", slow_but([name for name in WRITING if name not in ("merge", "narrow", "compress")], WRITING)
)
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
    made = here("export", pair.few, "--to", "upstream", "-o", "few.pt", cwd=tmp_path)
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


# fid

FID = ("--images", 8, "--extractor", "pixels")


def conditions(outcome: Outcome, side: str) -> tuple[Any, ...]:
    sampling = outcome.result["conditions"][side]["sampling"]
    return tuple(sampling[name] for name in ("solver", "steps", "cfg", "nfe", "images", "seed"))


def test_a_copy_is_scored_at_its_own_steps_against_the_original_at_its_own(pair: DistilledPair, tmp_path: Path) -> None:
    scored = here("fid", pair.few, "--ref", pair.original, *FID, cwd=tmp_path)
    assert conditions(scored, "subject") == ("euler", 4, 1.0, 4, 8, 0)
    assert conditions(scored, "reference") == conditions(scored, "original") == ("ab2", 16, 1.5, 32, 8, 0)
    assert scored.result["paired"]["n"] == 8
    assert scored.result["conditions"]["subject"]["distilled"]["steps"] == 4
    assert "distilled" not in scored.result["conditions"]["reference"]
    assert notes_of(scored) == [f"{TOLD}; sampling so"]
    text = here("fid", pair.few, "--ref", pair.original, *FID, "--text", cwd=tmp_path).out
    assert "euler, 4 steps, cfg 1, 4 NFE an image" in text
    assert "solver of the reference" in text and "ab2, 16 steps, cfg 1.5, 32 NFE an image" in text
    few, fine = (
        here("sample", path, "--images", 8, *settings, "-o", name, cwd=tmp_path)
        for path, name, settings in ((pair.few, "a.safetensors", ()), (pair.original, "b.safetensors", ("--cfg", 1.5)))
    )
    a, b = (read_images(Path(each.envelope["samples"])).images for each in (few, fine))
    assert scored.result["paired"] == asdict(paired_error(a, b, 255))


def test_samples_of_a_copy_and_of_the_original_pair(pair: DistilledPair, tmp_path: Path) -> None:
    here("sample", pair.few, "--images", 8, "-o", "few.samples.safetensors", cwd=tmp_path)
    fine = here(
        "sample", pair.original, "--images", 8, "--steps", 64, "--cfg", 1.5, "-o", "fine.safetensors", cwd=tmp_path
    )
    assert "distilled" not in read_header(Path(fine.envelope["samples"]))
    assert read_header(tmp_path / "few.samples.safetensors")["distilled"]["steps"] == 4
    direct = here("fid", pair.few, "--ref", "fine.safetensors", *FID, cwd=tmp_path)
    stored = here("fid", "few.samples.safetensors", "--ref", "fine.safetensors", *FID, cwd=tmp_path)
    assert conditions(direct, "reference") == ("ab2", 64, 1.5, 128, 8, 0)
    assert direct.result["paired"] == stored.result["paired"] and direct.result["paired"]["n"] == 8
    assert direct.result["frechet"] == stored.result["frechet"]
    against = here("fid", "few.samples.safetensors", "--ref", pair.original, *FID, "--seed", 5, cwd=tmp_path)
    assert conditions(against, "original") == ("ab2", 16, 1.5, 32, 8, 0)
    assert against.result["paired"]["n"] == 8


def test_other_guidance_than_that_in_the_weights_is_warned_of(pair: DistilledPair, tmp_path: Path) -> None:
    here("sample", pair.original, "--images", 8, "-o", "plain.safetensors", cwd=tmp_path)
    scored = here("fid", pair.few, "--ref", "plain.safetensors", *FID, cwd=tmp_path)
    said = "warning: plain.safetensors against few.safetensors: no guidance at sampling, guidance 1.5 in the weights"
    assert any(said in line for line in scored.notes) and scored.result["paired"]["n"] == 8
    again = here("fid", pair.few, "--ref", "plain.safetensors", *FID, cwd=tmp_path)
    assert any(said in line for line in again.notes), "also where the score was kept"


@pytest.mark.parametrize(("guide", "by"), [("top1", "top1"), ("ab" * 32, None)])
def test_guidance_by_a_weaker_model_is_the_originals_too_where_it_can_be(
    guide: str, by: str | None, tmp_path: Path
) -> None:
    distilled = replace(FOUR, guide=guide, guide_scale=0.5, guide_interval=(0.0, 0.9))
    pair = distilled_pair(tmp_path, distilled)
    scored = here("fid", pair.few, "--ref", pair.original, *FID, cwd=tmp_path)
    found = scored.result["conditions"]["reference"]["sampling"].get("guide")
    expected = {"model": "top1", "scale": 0.5, "interval": [0.0, 0.9]}
    assert found == (expected if by else None)
    warned = [line for line in scored.notes if "guidance 0.5 by a weaker copy in the weights" in line]
    assert len(warned) == (0 if by else 1)


def test_the_weaker_copy_that_guided_is_given_to_score_a_distilled_one(tmp_path: Path) -> None:
    weak = make_pico(sampler="rf", **{**SMALL, "seed": 8}).save(tmp_path / "weak.safetensors")
    guide = open_checkpoint(weak).fingerprint
    pair = distilled_pair(tmp_path, replace(FOUR, guide=guide, guide_scale=0.5, guide_interval=(0.0, 0.9)))
    given = ("--guide-with", weak, "--guide-scale", 0.5, "--guide-interval", "0,0.9")
    for subject, ref, guided in ((pair.few, pair.original, "reference"), (pair.original, pair.few, "subject")):
        scored = here("fid", subject, "--ref", ref, *FID, *given, cwd=tmp_path)
        sampled = {side: scored.result["conditions"][side]["sampling"] for side in ("subject", "reference")}
        assert sampled.pop(guided)["guide"] == {"model": guide, "scale": 0.5, "interval": [0.0, 0.9]}
        assert [each.get("guide") for each in sampled.values()] == [None]
        assert scored.result["paired"]["n"] == 8
        assert not any("in the weights, which" in line for line in scored.notes)
    other = here("fid", pair.few, "--ref", pair.original, *FID, *given[:3], 0.3, cwd=tmp_path).error(2)
    assert other.startswith("--guide-scale 0.3: few.safetensors was distilled to 4 steps")


def test_what_became_of_a_copy_pairs_with_the_original_and_with_the_copy(pair: DistilledPair, tmp_path: Path) -> None:
    small = here(
        "quantize", pair.few, "--bits", 8, "--uniform", "--rounding", "nearest", "-o", "s.safetensors", cwd=tmp_path
    ).path
    against = here("fid", small, "--ref", pair.original, *FID, cwd=tmp_path)
    assert conditions(against, "reference") == ("ab2", 16, 1.5, 32, 8, 0) and against.result["paired"]["n"] == 8
    copy = here("fid", small, "--ref", pair.few, *FID, cwd=tmp_path)
    assert conditions(copy, "reference") == conditions(copy, "subject") == ("euler", 4, 1.0, 4, 8, 0)
    assert copy.result["paired"]["mse"] < against.result["paired"]["mse"]


def test_the_original_as_subject_is_guided_as_its_copy_is(pair: DistilledPair, tmp_path: Path) -> None:
    scored = here("fid", pair.original, "--ref", pair.few, *FID, cwd=tmp_path)
    assert conditions(scored, "subject") == ("ab2", 16, 1.5, 32, 8, 0)
    assert conditions(scored, "reference") == ("euler", 4, 1.0, 4, 8, 0) and scored.result["paired"]["n"] == 8


def test_several_subjects_are_each_sampled_in_their_own_way(pair: DistilledPair, tmp_path: Path) -> None:
    small = here(
        "quantize",
        pair.original,
        "--bits",
        8,
        "--uniform",
        "--rounding",
        "nearest",
        "-o",
        "s.safetensors",
        cwd=tmp_path,
    ).path
    scored = here("fid", small, pair.few, "--ref", pair.original, *FID, cwd=tmp_path)
    sides = [file["conditions"] for file in scored.result["files"]]
    assert [side["subject"]["sampling"]["nfe"] for side in sides] == [16, 4]
    assert [side["reference"]["sampling"]["nfe"] for side in sides] == [16, 32]
    assert all(file["paired"]["n"] == 8 for file in scored.result["files"])
    text = here("fid", small, pair.few, "--ref", pair.original, *FID, "--text", cwd=tmp_path).out
    assert "NFE an image" in text
    alike = here("fid", small, small, "--ref", pair.original, *FID, "--text", cwd=tmp_path).out
    assert "NFE an image" not in alike


def test_strangers_are_not_paired_and_take_anyway(pair: DistilledPair, tmp_path: Path) -> None:
    """Neither a model of the same shape, nor a narrowed copy that the distilled one was not made from."""
    stranger = make_pico(sampler="rf", **{**SMALL, "seed": 9}).save(tmp_path / "stranger.safetensors")
    sibling = here(
        "prune", pair.original, "--keep", 0.5, "--calibration-images", 4, "-o", "h.safetensors", cwd=tmp_path
    ).path
    for other in (stranger, sibling):
        refused = here("fid", pair.few, "--ref", other, *FID, cwd=tmp_path).error(3)
        assert "was sampled under other settings (steps 16 there, 4 here" in refused
        scored = here("fid", pair.few, "--ref", other, *FID, "--anyway", cwd=tmp_path)
        assert scored.result["paired"] is None
        assert conditions(scored, "reference") == ("ab2", 16, 1.0, 16, 8, 0)


def test_statistics_of_the_original_serve_as_reference(pair: DistilledPair, tmp_path: Path) -> None:
    here("fid", pair.original, *FID, "--cfg", 1.5, "--save-statistics", "st.safetensors", cwd=tmp_path)
    scored = here("fid", pair.few, "--ref", "st.safetensors", *FID, cwd=tmp_path)
    direct = here("fid", pair.few, "--ref", pair.original, *FID, cwd=tmp_path)
    assert scored.result["frechet"] == pytest.approx(direct.result["frechet"])


def test_scores_of_copies_are_kept_by_how_they_were_distilled(pair: DistilledPair, tmp_path: Path) -> None:
    """The same weights of other words on distilling are sampled otherwise: nothing is taken for the other's."""
    first = here("fid", pair.few, "--ref", pair.original, *FID, cwd=tmp_path)
    assert any(
        "kept from an earlier run" in line
        for line in here("fid", pair.few, "--ref", pair.original, *FID, cwd=tmp_path).notes
    )
    folder = tmp_path / "other"
    folder.mkdir()
    other = distilled_pair(folder, replace(FOUR, cfg=4.0))
    second = here("fid", other.few, "--ref", other.original, *FID, cwd=tmp_path)
    assert conditions(second, "reference")[2] == 4.0
    assert second.result["paired"]["mse"] != first.result["paired"]["mse"]


def test_a_pipe_scores_samples_of_a_copy_against_the_original(pair: DistilledPair, tmp_path: Path) -> None:
    sampled = here("sample", pair.few, "--images", 8, cwd=tmp_path)
    envelope = {**sampled.envelope, "original": str(pair.original)}
    scored = here("fid", *FID, cwd=tmp_path, stdin=json.dumps(envelope))
    assert conditions(scored, "subject") == ("euler", 4, 1.0, 4, 8, 0)
    assert conditions(scored, "reference") == ("ab2", 16, 1.5, 32, 8, 0) and scored.result["paired"]["n"] == 8


# compare

COMPARE = ("--images", 4)


def test_images_alone_are_compared_where_steps_differ(pair: DistilledPair, tmp_path: Path) -> None:
    found = here("compare", pair.original, pair.few, *COMPARE, "-o", "c.safetensors", "--grid", "g.png", cwd=tmp_path)
    result = found.result
    a, b = result["conditions"]["sampling"], result["conditions"]["sampling_b"]
    assert [(each["solver"], each["steps"], each["cfg"], each["nfe"]) for each in (a, b)] == [
        ("ab2", 16, 1.5, 32),
        ("euler", 4, 1.0, 4),
    ]
    assert result["prediction"] is result["depth"] is result["routing"] is None
    scored = here("fid", pair.few, "--ref", pair.original, *COMPARE, "--extractor", "pixels", cwd=tmp_path).result
    assert result["images"]["mse"] == scored["paired"]["mse"] and result["images"]["n"] == 4
    assert result["quick"]["estimate"] == pytest.approx(scored["frechet"])
    assert any("images alone are compared; ditmoe inspect --values compares their weights" in n for n in found.notes)
    assert not any("prediction" in name for name in read_safetensors_header(tmp_path / "c.safetensors").tensors)
    kept = here("compare", pair.original, pair.few, *COMPARE, cwd=tmp_path)
    assert any("kept from an earlier run" in line for line in kept.notes) and kept.result == result
    text = here("compare", pair.few, pair.original, *COMPARE, "--text", cwd=tmp_path).out
    assert "solver of A" in text and "euler, 4 steps, cfg 1, 4 NFE an image" in text


@pytest.mark.parametrize(("option", "value"), [("--max-error", 0.1), ("--bins", 2)])
def test_what_is_measured_by_steps_is_refused_where_these_differ(
    option: str, value: float, pair: DistilledPair, tmp_path: Path
) -> None:
    said = here("compare", pair.original, pair.few, *COMPARE, option, value, cwd=tmp_path).error(2)
    assert said.startswith(
        f"{option} has no effect where original.safetensors and few.safetensors are sampled by other"
    )


def test_copies_of_the_same_steps_are_compared_step_by_step(pair: DistilledPair, tmp_path: Path) -> None:
    small = here(
        "quantize", pair.few, "--bits", 8, "--uniform", "--rounding", "nearest", "-o", "s.safetensors", cwd=tmp_path
    ).path
    found = here("compare", pair.few, small, *COMPARE, cwd=tmp_path).result
    assert found["conditions"]["sampling"]["nfe"] == found["conditions"]["bins"] == 4
    assert "sampling_b" not in found["conditions"] and found["prediction"]["relative_error"] > 0
    same = here("compare", pair.few, pair.few, *COMPARE, cwd=tmp_path).result
    assert same["prediction"]["relative_error"] == 0


def test_steps_that_are_named_hold_for_both(tmp_path: Path) -> None:
    """Without guidance in the weights, the same steps of both are followed one by one, with the warning of all such."""
    pair = distilled_pair(tmp_path, replace(FOUR, cfg=1.0))
    options = ("--steps", 6, "--solver", "euler")
    found = here("compare", pair.original, pair.few, *COMPARE, *options, cwd=tmp_path)
    assert found.result["prediction"] is not None and len(notes_of(found)) == 1
    several = here("compare", pair.original, pair.few, pair.original, *COMPARE, cwd=tmp_path).result["files"]
    assert several[0]["prediction"] is None and several[1]["prediction"]["relative_error"] == 0
    text = here("compare", pair.original, pair.few, pair.original, *COMPARE, "--text", cwd=tmp_path).out
    assert "n/a" in text


# bench


def test_bench_tells_what_an_image_takes_of_each_at_its_own_steps(pair: DistilledPair, tmp_path: Path) -> None:
    options = ("--batch", 2, "--repeats", 1, "--threads", 1)
    found = here("bench", pair.original, pair.few, *options, cwd=tmp_path)
    images = [file["image"] for file in found.result["files"]]
    assert [(image["solver"], image["steps"], image["nfe"]) for image in images] == [("ab2", 16, 32), ("euler", 4, 4)]
    assert notes_of(found) == [f"{TOLD}; sampling so"]
    text = here("bench", pair.original, pair.few, *options, "--text", cwd=tmp_path).out
    assert "by 16 steps of ab2, cfg 1.5, 32 NFE" in text and "by 4 steps of euler, 4 NFE" in text
    alone = here("bench", pair.few, *options, "--text", cwd=tmp_path).out
    assert "by 4 steps of euler, 4 NFE" in alone
    said = here("bench", pair.original, pair.few, *options, "--cfg", 1.5, cwd=tmp_path).error(2)
    assert said.startswith("--cfg 1.5: few.safetensors was distilled to 4 steps of euler")


def test_compare_guides_the_original_by_the_weaker_copy_that_guided(tmp_path: Path) -> None:
    weak = make_pico(sampler="rf", **{**SMALL, "seed": 8}).save(tmp_path / "weak.safetensors")
    pair = distilled_pair(tmp_path, replace(FOUR, guide=open_checkpoint(weak).fingerprint, guide_scale=0.5))
    lacking = here("compare", pair.original, pair.few, *COMPARE, cwd=tmp_path)
    assert any("guidance 1.5 and guidance 0.5 by a weaker copy in the weights" in line for line in lacking.notes)
    given = ("--guide-with", weak, "--guide-scale", 0.5)
    guided = here("compare", pair.original, pair.few, *COMPARE, *given, cwd=tmp_path)
    assert guided.result["conditions"]["sampling"]["nfe"] == 48 and not any("warning" in line for line in guided.notes)
    assert guided.result["images"]["mse"] != lacking.result["images"]["mse"]


# heal


def test_a_distilled_student_is_not_healed_towards_an_original_of_other_steps(
    pair: DistilledPair, tmp_path: Path
) -> None:
    said = here("heal", pair.few, "--original", pair.original, cwd=tmp_path).error(3)
    assert "few.safetensors: was distilled to 4 steps of euler, with guidance 1.5 in its weights" in said
    assert "train it on with ditmoe distill" in said
    two = save_distilled(
        moved(make_pico(sampler="rf", **SMALL), 0.05),
        tmp_path / "two.safetensors",
        open_checkpoint(pair.few).fingerprint,
        replace(FOUR, steps=2),
    )
    said = here("heal", two, "--original", pair.few, cwd=tmp_path).error(3)
    assert "two.safetensors: is not sampled by the steps that" in said


@pytest.mark.parametrize("sampler", slow_but(["rf"], ["rf", "ddpm"]))
def test_a_compressed_copy_is_healed_towards_the_distilled_one_at_its_own_times(
    sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heal_on_few_states(monkeypatch)
    asked: list[float] = []
    monkeypatch.setattr(NoisedImages, "at", _watched(NoisedImages.at, asked))
    pair = distilled_pair(tmp_path, sampler=sampler)
    half = here("prune", pair.few, "--keep", 0.5, "--no-refit", "--calibration-images", 8, cwd=tmp_path)
    healed = here(
        "heal",
        "--original",
        pair.few,
        "--steps",
        4,
        "--batch",
        8,
        "--calibration-images",
        8,
        "--scope",
        "model",
        cwd=tmp_path,
        stdin=json.dumps(half.envelope),
    )
    assert open_checkpoint(healed.path).distilled == open_checkpoint(pair.few).distilled
    assert set(asked) == ({1.0, 0.75, 0.5, 0.25} if sampler == "rf" else {999.0, 749.0, 499.0, 249.0})
    before, after = healed.result["held_error"]
    assert after <= before


def _watched(at: Any, asked: list[float]) -> Any:
    def watched(states: NoisedImages, rows: torch.Tensor) -> Any:
        found = at(states, rows)
        asked.extend(found.t.tolist())
        return found

    return watched


def test_compress_does_not_distil_a_distilled_checkpoint_again(pair: DistilledPair, tmp_path: Path) -> None:
    said = here("compress", pair.few, "--ratio", 0.6, "--steps", 2, "--calibration-images", 16, cwd=tmp_path).error(2)
    assert said.startswith("--steps 2: few.safetensors was distilled to 4 steps of euler")


# words on distilling that cannot be


@pytest.mark.parametrize("changes", [{"solver": "nonsense"}, {"solver": "ddim"}, {"steps": 2000}])
def test_a_file_that_names_impossible_steps_is_refused_where_it_is_sampled(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    pair = distilled_pair(tmp_path, replace(FOUR, **changes))
    for words in (
        ("sample", pair.few),
        ("profile-experts", pair.few),
        ("fid", pair.few, "--ref", pair.original),
        ("compare", pair.original, pair.few),
        ("bench", pair.few),
        ("prune", pair.few, "--keep", 0.5),
        ("prune", pair.few, "--keep", 0.5, "--dry-run"),
    ):
        said = here(*words, cwd=tmp_path).error(3)
        assert "few.safetensors: its metadata says that it was distilled to" in said
    assert here("inspect", pair.few, cwd=tmp_path).result["distilled"]["steps"] == changes.get("steps", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.safetensors", "original.safetensors"]
