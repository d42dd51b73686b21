"""``ditmoe compress --max-damage``: the smallest file within a damage, on small models."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_helpers import Outcome, contents, here, on_terminal, outputs
from compressing import compress_on_few_tokens
from conftest import make_pico

from ditmoe_cli.compression.joint.carrying import by_image
from ditmoe_cli.compression.joint.image_distance import PURPOSE, SAMPLED, sampled_images
from ditmoe_cli.compression.replay.guided import in_branches
from ditmoe_cli.compression.replay.states import calibration_states
from ditmoe_cli.compression.working_sizes import HELD_OUT, judged_images
from ditmoe_cli.files.provenance import Step
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.routing.calibration_settings import profiled_spec
from ditmoe_cli.routing.profile import RoutingProfile, read_profile

IMAGES = 32
ALLOWED = 0.05
COMPRESS = ("compress", "a.safetensors", "--profile", "p.safetensors")


@pytest.fixture(scope="module", autouse=True)
def few_tokens() -> Iterator[None]:
    """For commands in this process."""
    with pytest.MonkeyPatch.context() as patched:
        compress_on_few_tokens(patched, 512)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and profiles of two seeds and of few images; not to be written to."""
    folder = tmp_path_factory.mktemp("damage")
    make_pico(sampler="rf", in_channels=1, input_size=4, hidden=32, experts=3).save(folder / "a.safetensors")
    for name, images, seed in (("p", IMAGES, 0), ("other", IMAGES, 1), ("few", 8, 0)):
        settings = ("--images", images, "--steps", 4, "--bins", 2, "--cfg", 1.5, "--seed", seed)
        assert here("profile-experts", "a.safetensors", *settings, "-o", f"{name}.safetensors", cwd=folder).code == 0
    return folder


@pytest.fixture(scope="module")
def within(made: Path) -> Outcome:
    return here(*COMPRESS, "--max-damage", ALLOWED, "-o", "within.safetensors", cwd=made)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The checkpoint and its profiles alone."""
    target = tmp_path / "folder"
    target.mkdir()
    for name in ("a", "p", "other", "few"):
        shutil.copy(made / f"{name}.safetensors", target)
    return target


@pytest.mark.slow
def test_the_result_tells_its_bound_its_neighbour_and_its_images(within: Outcome) -> None:
    result = within.result
    assert 0 < result["tried_error"] < result["damage"] <= ALLOWED
    assert result["bytes"] == within.path.stat().st_size < result["bytes_before"]
    smaller = result["next_smaller"]
    assert smaller["bytes"] < result["bytes"] and smaller["damage"] > ALLOWED
    distance = result["paired_distance"]
    assert 0 <= distance["low"] < distance["mean"] < distance["high"]
    assert (distance["images"], distance["sampled"], distance["of"]) == (256, SAMPLED, "pixels")


def test_the_file_keeps_what_was_asked_for_and_the_bound(within: Outcome) -> None:
    step: Step = open_checkpoint(within.path).provenance().history[-1]
    assert step.options["max_damage"] == ALLOWED
    assert float(step.measured["damage"][0]) == pytest.approx(within.result["damage"], rel=1e-3)


def test_its_distance_is_that_of_images_which_both_models_sample(within: Outcome, made: Path) -> None:
    """The profile's settings and noise, by ``sample_batch`` of both models, and the errors of ``fid``'s pixels."""
    from ditmoe_cli.diffusion.sampling import sample_batch
    from ditmoe_cli.evaluation.images import to_uint8
    from ditmoe_cli.evaluation.scores.paired_error import paired_error

    profile, original = read_profile(made / "p.safetensors"), open_checkpoint(made / "a.safetensors")
    spec = profiled_spec(profile.calibration, original)
    indices = sampled_images(IMAGES)
    assert indices == [0, 4, 8, 12, 16, 20, 24, 28]
    images = [
        to_uint8(sample_batch(build_model(each, torch.device("cpu")), spec, indices, purpose=PURPOSE))
        for each in (original, open_checkpoint(within.path))
    ]
    expected = paired_error(*images, original.card.grey_levels).mse
    assert within.result["paired_distance"]["mean"] == pytest.approx(expected, rel=0.05)


def test_images_that_judge_are_others_than_those_that_choose_strengths() -> None:
    assert list(judged_images(64)) == list(range(3, 64, 8))
    held = {image for image in range(64) if image % HELD_OUT == HELD_OUT - 1}
    assert not held & set(judged_images(64))
    assert list(judged_images(3)) == [2], "of few images the last, which is fitted on too"


def error_on(profile: RoutingProfile, original: Checkpoint, changed: Checkpoint) -> float:
    """The relative squared error of the guided prediction, by whole models, on states of all images of a profile."""
    seen = calibration_states(profile, profiled_spec(profile.calibration, original), 4 * IMAGES)
    cpu = torch.device("cpu")
    guided = in_branches(seen, OffloadedDiTMoE(original, cpu))
    with torch.inference_mode():
        expected, found = (
            guided.guided(build_model(each, cpu)(guided.z, guided.t, guided.labels)) for each in (original, changed)
        )
    return by_image(found, expected, seen.images).error


def test_the_damage_holds_on_another_seed(within: Outcome, made: Path) -> None:
    """On noise and images of another calibration, none of which the plan has seen."""
    original, changed = open_checkpoint(made / "a.safetensors"), open_checkpoint(within.path)
    error = error_on(read_profile(made / "other.safetensors"), original, changed)
    assert 0 < error <= ALLOWED


@pytest.mark.slow
def test_the_damage_of_the_demo_holds_on_two_other_seeds(tmp_path: Path) -> None:
    """A trained model, calibrated on 64 images of seed 0; errors on 128 states of 64 other images for each seed."""
    allowed = 0.02
    calibrated = ("--calibration-images", 64, "--calibration-cfg", 1.5)
    written = here("compress", "demo:digits", "--max-damage", allowed, *calibrated, "-o", "c.safetensors", cwd=tmp_path)
    original = open_checkpoint(Path(written.envelope["original"]))
    assert written.result["ratio"] < 0.2 and written.result["damage"] <= allowed
    profiled = ("profile-experts", original.path, "--images", 64, "--cfg", 1.5, "--reservoir", 1024)
    for seed in (1, 2):
        assert here(*profiled, "--seed", seed, "-o", f"{seed}.safetensors", cwd=tmp_path).code == 0
        error = error_on(read_profile(tmp_path / f"{seed}.safetensors"), original, open_checkpoint(written.path))
        assert allowed / 3 < error <= allowed


@pytest.mark.slow
def test_more_damage_takes_no_more_bytes_and_a_repeated_run_the_same(made: Path, folder: Path, within: Outcome) -> None:
    again = here(*COMPRESS, "--max-damage", ALLOWED, "-o", "within.safetensors", cwd=folder)
    assert contents(folder)["within.safetensors"] == contents(made)["within.safetensors"]
    assert again.result["paired_distance"] == within.result["paired_distance"]
    worse = here(*COMPRESS, "--max-damage", 0.5, cwd=folder)
    assert worse.result["bytes"] < within.result["bytes"] and worse.result["damage"] <= 0.5
    assert worse.path.name == "a.compress-damage0.5.safetensors"
    assert not list(folder.glob(".*"))


def test_a_second_run_finds_it_up_to_date_and_a_dry_run_says_so_too(made: Path, within: Outcome) -> None:
    again = here(*COMPRESS, "--max-damage", ALLOWED, "-o", "within.safetensors", cwd=made)
    assert again.result["up_to_date"] and again.result["damage"] == pytest.approx(within.result["damage"], rel=1e-3)


@pytest.mark.slow
def test_a_terminal_shows_the_damage_and_the_distance(made: Path, folder: Path) -> None:
    for measured in made.glob("p.*"):
        shutil.copy(measured, folder)
    code, text = on_terminal(*COMPRESS, "--max-damage", 2, cwd=folder)
    assert code == 0 and "damage  " in text and "at most " in text and "mean of 256 images" in text


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--max-damage", 0), 2, "--max-damage 0: give a relative squared error of the guided prediction, above 0"),
        (("--max-damage", -1), 2, "--max-damage -1: give"),
        (("--max-damage", "nan"), 2, "--max-damage nan: give"),
        (("--max-damage", "inf"), 2, "--max-damage inf: give"),
        (("--max-damage", 0.1, "--ratio", 0.5), 2, "give one of --size"),
        (("--max-damage", 0.1, "--size", "1MB"), 2, "give one of --size"),
        ((), 2, "give one of --size"),
        (("--max-damage", 0.1, "--profile", "few.safetensors"), 3, "holds out 1 image, and a bound of --max-damage"),
    ],
)
def test_bad_input(options: tuple[object, ...], code: int, message: str, folder: Path) -> None:
    before = set(outputs(folder))
    words = COMPRESS[:2] if "--profile" in options else COMPRESS
    assert message in here(*words, *options, "-o", "x.safetensors", cwd=folder).error(code)
    assert {name for name in outputs(folder) if not name.startswith("p.")} <= before


@pytest.mark.usefixtures("within")  # which measures
def test_a_damage_that_no_smaller_file_keeps_to_is_refused(made: Path, folder: Path) -> None:
    for measured in made.glob("p.*"):
        shutil.copy(measured, folder)
    message = here(*COMPRESS, "--max-damage", 1e-12, "-o", "x.safetensors", cwd=folder).error(4)
    assert "no smaller file of it was found within --max-damage 1e-12; the least damage" in message
    assert not (folder / "x.safetensors").exists()


def test_a_dry_run_without_a_profile_leaves_the_size_open(folder: Path) -> None:
    message = here("compress", "a.safetensors", "--max-damage", 0.1, "--dry-run", cwd=folder).error(3)
    assert "rests on measured errors; give a --profile" in message
