"""What distilling takes, from shapes."""

from __future__ import annotations

from typing import Any

import pytest
from configs import upstream
from conftest import make_pico

from ditmoe_cli.compression.distill.distilling import Distilling
from ditmoe_cli.compression.distill.distilling_memory import (
    PATH_BYTES,
    distilling_bytes,
    distilling_effort,
    distilling_estimate,
    held_paths,
    most_paths,
    path_bytes,
    paths_for,
)
from ditmoe_cli.compression.training.trained_tensors import TrainedSize
from ditmoe_cli.compression.training.training_memory import end_to_end_bytes
from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.model.effort import BASELINE_BYTES, activation_bytes, image_flops, model_bytes

SMALL, XL = upstream(12, 384, 6, 8, "flash"), upstream(28, 1152, 16, 8, "flash")
DIGITS = make_pico(sampler="rf", in_channels=1).config
ALL = TrainedSize(model_bytes(SMALL) // 4, 0)


def asked(iterations: int = 2000, **fields: Any) -> Distilling:
    return Distilling("f", **{"minutes": None, "iterations": iterations, **fields})


def test_paths_by_hand() -> None:
    assert path_bytes(SMALL, 4) == 5 * 4 * 32 * 32 * 4, "four states and the image, of 4 channels in fp32"
    assert most_paths(SMALL, 4) == PATH_BYTES // path_bytes(SMALL, 4) == 26_214
    assert most_paths(DIGITS, 4) == 65_536, "however small they are"
    huge = make_pico(sampler="rf", in_channels=3, input_size=4096, patch=64, depth=1).config
    assert most_paths(huge, 4) == 16, "and however large"


@pytest.mark.parametrize(
    ("count", "judging"), [(1, 1), (2, 1), (15, 1), (16, 2), (128, 16), (2048, 256), (65_536, 512)]
)
def test_paths_that_judge(count: int, judging: int) -> None:
    assert held_paths(count) == judging


@pytest.mark.parametrize(
    ("iterations", "fields", "expected"),
    [
        (2000, {}, 29_538 + 512),  # 2000 · 128 states, three passes each, over 26 evaluations a path
        (2000, {"steps": 1}, 29_538 + 512),
        (2000, {"teacher_steps": 16}, 32_000 + 512),  # each state met twice: 128,000 states of four steps a path
        (2000, {"steps": 1, "teacher_steps": 16}, 42_666 + 512),
        (100, {}, 1476 + 184),
        (100, {"batch": 64}, 738 + 92),
        (100, {"steps": 8}, 800 + 100),
        (1, {"batch": 8}, 16),
    ],
)
def test_paths_that_iterations_are_worth(iterations: int, fields: dict[str, Any], expected: int) -> None:
    assert paths_for(DIGITS, asked(iterations, **fields)) == expected


def test_no_more_paths_than_there_is_room_for() -> None:
    assert paths_for(XL, asked(100_000)) == most_paths(XL, 4)
    progressive = asked(100_000, steps=1, progressive=True)
    assert paths_for(XL, progressive) == most_paths(XL, 8), "of eight states at first"


def test_memory_is_that_of_the_student_alone() -> None:
    found = distilling_bytes(SMALL, ALL, 16, 2)
    assert found == end_to_end_bytes(SMALL, ALL, 16, 2) < distilling_bytes(SMALL, ALL, 16)
    estimate = distilling_estimate(SMALL, SMALL, asked(batch=16), ALL)
    paths = paths_for(SMALL, asked(batch=16)) * path_bytes(SMALL, 4)
    assert estimate.memory == pytest.approx(BASELINE_BYTES + end_to_end_bytes(SMALL, ALL, 16) + paths)
    teaching = distilling_estimate(SMALL, XL, asked(batch=1, cfg=1.5), TrainedSize(1000, 0))
    paths = paths_for(XL, asked(batch=1)) * path_bytes(XL, 4)
    at_once = 2 * min(256, paths_for(XL, asked(batch=1)))
    assert teaching.memory == pytest.approx(BASELINE_BYTES + model_bytes(XL) + activation_bytes(XL, at_once) + paths), (
        "or that of sampling, where it is more"
    )


def test_operations_by_hand() -> None:
    """Paths 16 · evaluations · branches, three passes a state, and checks; the fewest paths are taken."""
    tiny: dict[str, Any] = {"batch": 4, "teacher_steps": 8}
    one, two = (distilling_effort(SMALL, XL, asked(n, **tiny), ALL, n) for n in (1, 2))
    assert two.flops - one.flops == pytest.approx(4 * 3 * image_flops(SMALL))
    judged = held_paths(16) * 4 * 3 * image_flops(SMALL)
    sampled = 16 * 10 * image_flops(XL)
    assert one.flops == pytest.approx(sampled + judged + 4 * 3 * image_flops(SMALL))
    guided = distilling_effort(SMALL, XL, asked(1, cfg=1.5, **tiny), ALL, 1)
    assert guided.flops - one.flops == pytest.approx(sampled), "of the original both branches, of the student one"
    weak = distilling_effort(SMALL, XL, asked(1, guide=Guide("top1", 1.0), **tiny), ALL, 1)
    assert weak.flops == pytest.approx(guided.flops), "a weaker model is taken for as large"
    own = distilling_effort(SMALL, XL, asked(1, states="own", **tiny), ALL, 1)
    assert own.flops - one.flops == pytest.approx(2 * 1.5 * image_flops(SMALL)), (
        "of half of them three halves on the way"
    )


def test_minutes_take_minutes_unless_a_single_step_takes_longer() -> None:
    estimate = distilling_estimate(SMALL, SMALL, Distilling("f", minutes=7), ALL)
    assert estimate.what == "distilling to 4 steps"
    assert estimate.seconds(1e15) == estimate.seconds(1e13) == 420
    assert estimate.seconds(1e9) > 420, "a machine on which nothing is done in seven minutes"
    assert distilling_estimate(SMALL, SMALL, asked(100), ALL).asked_seconds == 0
