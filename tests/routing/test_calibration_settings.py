"""Calibration settings: what they hold, and what a profile's JSON gives back."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_pico
from distilling import FOUR, distilled_pair
from hypothesis import given
from hypothesis import strategies as st
from profiling import opened

from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import BadInputError, UsageError, named
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.routing.calibration_settings import (
    Calibration,
    WantedCalibration,
    default_calibration,
    parse_calibration,
    spread_classes,
    usual_classes,
    usual_images,
)

SPEC = SampleSpec(images=3, steps=4, cfg=1.5, seed=11, solver="ddim", classes=(0, 2))
SETTINGS = Calibration(SPEC, bins=2, reservoir=24, batch=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return opened(make_pico(hidden=16, input_size=4, seed=3), tmp_path_factory.mktemp("settings"))


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 1000])
def test_every_beginning_of_spread_classes_is_spread(classes: int) -> None:
    order = spread_classes(classes)
    assert sorted(order) == list(range(classes))
    for count in (2, 16, 67, 540):
        seen = sorted(order[:count])
        gaps = [b - a for a, b in itertools.pairwise([*seen, seen[0] + classes])]
        assert count >= classes or max(gaps) <= 3 * classes / count, count


specs = st.builds(
    SampleSpec,
    images=st.integers(1, 10**6),
    steps=st.integers(1, 1000),
    cfg=st.floats(0.0, 100.0),
    seed=st.integers(-(2**63), 2**63),
    solver=st.sampled_from(["ddim", "ddpm"]),
    classes=st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple),
)


@given(specs.flatmap(lambda spec: st.tuples(st.just(spec), st.integers(1, spec.steps))), st.integers(0, 10**6))
def test_settings_survive_json(checkpoint: Checkpoint, case: tuple[SampleSpec, int], reservoir: int) -> None:
    settings = Calibration(case[0], bins=case[1], reservoir=reservoir, batch=reservoir % 7 + 1)
    document = json.loads(json.dumps(settings.to_json()))
    again = parse_calibration(document, checkpoint)
    assert again == settings
    assert again.to_json() == document


@given(specs, specs)
def test_different_settings_are_written_differently(a: SampleSpec, b: SampleSpec) -> None:
    assert (Calibration(a).to_json() == Calibration(b).to_json()) == (a == b)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("images", "steps", "batch", "bins") for value in (0, None, "many")),
        ("reservoir", -1),
        ("reservoir", None),
        ("bins", 5),
        ("steps", 1001),
        ("cfg", -1.0),
        ("cfg", float("nan")),
        ("cfg", "high"),
        ("seed", None),
        ("solver", "euler"),
        ("solver", "heun"),
        ("solver", 5),
        ("classes", None),
        ("classes", 5),
        ("classes", []),
        ("classes", ["a"]),
        ("classes", [[0]]),
        ("classes", "all"),
        ("classes", "0-7"),
        ("classes", [3]),
    ],
)
def test_malformed_settings_of_a_file_are_bad_input(name: str, value: object, checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInputError, match="calibration settings"):
        parse_calibration({**SETTINGS.to_json(), name: value}, checkpoint)


@pytest.mark.parametrize("name", ["images", "steps", "cfg", "seed", "solver", "classes", "bins", "reservoir", "batch"])
def test_missing_settings_are_bad_input(name: str, checkpoint: Checkpoint) -> None:
    document = {key: value for key, value in SETTINGS.to_json().items() if key != name}
    with pytest.raises(BadInputError, match=f"'{name}'"):
        parse_calibration(document, checkpoint)


def test_settings_of_given_images_keep_their_digest_and_may_have_the_null_class(checkpoint: Checkpoint) -> None:
    settings = replace(SETTINGS, spec=replace(SPEC, classes=(0, 3, 1)), data="a" * 64)
    assert settings.to_json()["source"] == "data"
    assert parse_calibration(settings.to_json(), checkpoint) == settings
    with pytest.raises(BadInputError, match="calibration settings"):
        parse_calibration({**settings.to_json(), "data": 5}, checkpoint)


def test_what_was_asked_for_goes_over_the_ancestors_settings(checkpoint: Checkpoint) -> None:
    assert WantedCalibration().over(SETTINGS, checkpoint) is SETTINGS
    asked = WantedCalibration(images=5, cfg=4.0, classes=(1,))
    expected = replace(SETTINGS, spec=replace(SPEC, images=5, cfg=4.0, classes=(1,)))
    assert asked.over(SETTINGS, checkpoint) == expected
    assert asked.unlike(expected.to_json()) is None
    assert WantedCalibration(classes=(0, 1)).unlike({**SETTINGS.to_json(), "classes": "0-1"}) is None


def test_fewer_steps_than_bins_take_the_default_of_bins(checkpoint: Checkpoint) -> None:
    base = replace(SETTINGS, spec=replace(SPEC, steps=20), bins=10)
    assert WantedCalibration(steps=5).over(base, checkpoint).bins == 5
    assert WantedCalibration(steps=40).over(base, checkpoint).bins == 10


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (WantedCalibration(cfg=4.0), "calibration_cfg 4.0: the profile was made with 1.5"),
        (WantedCalibration(steps=8), "calibration_steps 8: the profile was made with 4"),
        (WantedCalibration(classes=(1,)), "calibration_classes"),
        (WantedCalibration(seed=0), "calibration_seed 0"),
    ],
)
def test_settings_that_a_profile_was_not_made_with_are_named(asked: WantedCalibration, said: str) -> None:
    unlike = asked.unlike(SETTINGS.to_json())
    assert unlike is not None and named(unlike).startswith(said)


@pytest.mark.parametrize("asked", [{"cfg": -1.0}, {"images": 0}, {"steps": 0}, {"classes": (7,)}])
def test_settings_out_of_range_are_refused_under_the_planners_names(
    asked: dict[str, Any], checkpoint: Checkpoint
) -> None:
    with pytest.raises(UsageError, match=f"^calibration_{next(iter(asked))}"):
        WantedCalibration(**asked).over(SETTINGS, checkpoint)


def test_fewer_images_of_many_patches_are_calibrated_on() -> None:
    assert [usual_images(patches) for patches in (1, 16, 64, 100, 256, 512, 1024)] == [64, 64, 64, 64, 24, 16, 16]
    for patches in range(1, 400):
        assert 16 <= usual_images(patches) <= 64 and usual_images(patches) % 8 == 0
        assert usual_images(patches + 1) <= usual_images(patches)


def test_in_fewer_steps_more_images_are_calibrated_on_at_the_same_cost() -> None:
    assert [usual_images(64, steps) for steps in (1, 2, 4, 8, 20)] == [1280, 640, 320, 160, 64]
    assert [usual_images(256, steps) for steps in (1, 2, 4, 8, 20)] == [512, 256, 128, 64, 24]
    for steps, patches in itertools.product(range(1, 100), (1, 64, 256, 1024)):
        images = usual_images(patches, steps)
        assert images == 16 or (images * steps <= 64 * 20 and images * steps * patches <= 131_072)


@pytest.mark.parametrize("sampler", ["rf", "ddpm"])
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_a_distilled_checkpoint_is_calibrated_by_its_own_steps(sampler: str, steps: int, tmp_path: Path) -> None:
    solver = "euler" if sampler == "rf" else "ddim-trailing"
    pair = distilled_pair(tmp_path, replace(FOUR, solver=solver, steps=steps), sampler=sampler)
    few = open_checkpoint(pair.few)
    settings = default_calibration(few)
    assert (settings.spec.solver, settings.spec.steps, settings.spec.cfg) == (solver, steps, 1.0)
    assert settings.bins == min(10, steps)
    assert few.calibration is None, "the teacher's settings are of other states"
    with pytest.raises(UsageError, match="calibration_cfg 4: few"):
        WantedCalibration(cfg=4.0).over(settings, few)
    assert WantedCalibration(steps=40).over(settings, few).bins == settings.bins
    assert default_calibration(open_checkpoint(pair.original)).spec.steps == 20


@given(images=st.integers(1, 1100), classes=st.integers(1, 1000))
def test_default_labels_are_all_or_evenly_spread(images: int, classes: int) -> None:
    labels = usual_classes(images, classes)
    assert len(labels) == min(images, classes) == len(set(labels)) and list(labels) == sorted(labels)
    assert labels[0] == 0 and labels[-1] < classes
    gaps = [right - left for left, right in zip(labels, (*labels[1:], classes), strict=True)]  # around the circle
    assert max(gaps) - min(gaps) <= 1


def test_default_labels_of_imagenet() -> None:
    assert usual_classes(24, 1000)[:4] == (0, 42, 83, 125)
    assert usual_classes(1000, 1000) == tuple(range(1000))


def test_default_labels_change_with_the_number_of_images_and_others_stay(tmp_path: Path) -> None:
    checkpoint = opened(make_pico(hidden=16, input_size=4, num_classes=90), tmp_path)
    usual = default_calibration(checkpoint)
    assert usual.spec.classes == usual_classes(64, 90)
    assert WantedCalibration(images=9).over(usual, checkpoint).spec.classes == tuple(range(0, 90, 10))
    assert WantedCalibration(images=90).over(usual, checkpoint).spec.classes == tuple(range(90))
    assert WantedCalibration(images=9, classes=(5,)).over(usual, checkpoint).spec.classes == (5,)
    chosen = replace(usual, spec=replace(usual.spec, classes=(3, 4)))
    assert WantedCalibration(images=9).over(chosen, checkpoint).spec.classes == (3, 4)
    data = replace(chosen, spec=replace(chosen.spec, images=9, classes=usual_classes(9, 90)), data="a" * 64)
    assert WantedCalibration(images=3).over(data, checkpoint).spec.classes == data.spec.classes


@pytest.mark.parametrize(("sampler", "solver"), [("rf", "euler"), ("ddpm", "ddim")])
def test_default_settings_fit_the_weights(sampler: str, solver: str, tmp_path: Path) -> None:
    checkpoint = opened(make_pico(hidden=16, input_size=4, sampler=sampler, num_classes=5), tmp_path)
    settings = default_calibration(checkpoint)
    assert (settings.spec.solver, settings.spec.classes) == (solver, (0, 1, 2, 3, 4))
    assert settings.data is None
    assert parse_calibration(settings.to_json(), checkpoint) == settings
