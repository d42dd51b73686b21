"""What healing takes, from shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import make_pico

from ditmoe_cli.compression.heal.healing import Healing
from ditmoe_cli.compression.heal.healing_memory import (
    HELD_STATES,
    block_scope_bytes,
    block_scope_effort,
    block_states,
    healing_estimate,
    images_for,
    model_scope_bytes,
    model_scope_effort,
)
from ditmoe_cli.compression.training.trained_tensors import TrainedSize
from ditmoe_cli.compression.training.training_memory import TRAINED_BYTES, checks_of
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig
from ditmoe_cli.model.effort import activation_bytes, block_flops, image_flops, model_bytes

CALIBRATION = {"cfg": 1.5, "steps": 20, "images": 64}


def upstream_like(depth: int, width: int, experts: int, ratio: float = 1.0) -> DiTMoEConfig:
    """An upstream model of 256 tokens an image; `ratio` narrows its experts."""
    block = BlockConfig(experts, (int(4 * width * ratio),) * experts, 2 * width)
    return DiTMoEConfig(32, 2, 4, 8, width, depth, 16, 1000, 2, "flash", "rf", (block,) * depth)


SMALL, HALF = upstream_like(12, 384, 8), upstream_like(12, 384, 8, 0.5)
GIANT, NARROW = upstream_like(40, 1408, 16), upstream_like(40, 1408, 16, 0.5)


def test_states_images_and_checks() -> None:
    assert block_states(SMALL) == 256 and block_states(make_pico(input_size=4).config) == 16_384
    assert [images_for(steps, 128) for steps in (None, 1, 100, 10_000)] == [4096, 2, 200, 4096]
    assert [checks_of(steps) for steps in (1, 19, 40, 400, 10_000)] == [1, 1, 2, 20, 25]


def test_memory_of_the_whole_model_by_hand() -> None:
    trained, activations = TrainedSize(1000, 0), activation_bytes(HALF, 2 * 8)
    expected = model_bytes(SMALL) + model_bytes(HALF) + (TRAINED_BYTES - 4) * 1000 + 12 * 1.5 * activations
    assert model_scope_bytes(HALF, SMALL, trained, 8, 1.5) == pytest.approx(expected)
    half = model_scope_bytes(HALF, SMALL, trained, 8, 1.0) - model_scope_bytes(HALF, SMALL, trained, 0, 1.0)
    whole = model_scope_bytes(HALF, SMALL, trained, 8, 1.5) - model_scope_bytes(HALF, SMALL, trained, 0, 1.5)
    assert whole == pytest.approx(2 * half), "two branches"


def test_a_giant_is_healed_block_after_block_on_one_card() -> None:
    weights = TrainedSize(model_bytes(NARROW) // 4, 0)
    assert (
        block_scope_bytes(NARROW, GIANT, weights, 128, 1.5) < 80e9 < model_scope_bytes(NARROW, GIANT, weights, 1, 1.5)
    )


def test_operations_by_hand() -> None:
    one = model_scope_effort(HALF, SMALL, 1, 128, 1.5)
    two = model_scope_effort(HALF, SMALL, 2, 128, 1.5)
    step = 2 * 128 * (image_flops(SMALL) + 3 * image_flops(HALF))
    assert two.flops - one.flops == pytest.approx(step)
    assert one.flops - step == pytest.approx(2 * HELD_STATES * (image_flops(SMALL) + 3 * image_flops(HALF)))
    blocks = [block_scope_effort(HALF, SMALL, steps, 128, 1.0).flops for steps in (1, 2)]
    assert blocks[1] - blocks[0] == pytest.approx(3 * 128 * sum(block_flops(HALF, block) for block in HALF.blocks))


def estimated(**fields: Any) -> tuple[float, float]:
    asked = Healing("f", **{"minutes": None, "iterations": 2000, **fields})
    estimate = healing_estimate(HALF, SMALL, asked, TrainedSize(model_bytes(HALF) // 4, 0), CALIBRATION)
    assert estimate.what == "healing 12 blocks"
    return estimate.seconds(1e12), estimate.memory


def test_estimates_follow_what_is_asked() -> None:
    block, model, auto = (estimated(scope=scope) for scope in ("block", "model", "auto"))
    assert block[0] < model[0] < auto[0] < block[0] + model[0], "both models are loaded once"
    assert block[1] < model[1] == auto[1]
    assert estimated(iterations=4000)[0] > 1.6 * auto[0] and estimated(batch=64)[0] < 0.6 * auto[0]


def test_minutes_take_minutes_unless_a_single_step_takes_longer() -> None:
    asked = Healing("f", minutes=7)
    estimate = healing_estimate(HALF, SMALL, asked, TrainedSize(1000, 0), CALIBRATION)
    assert estimate.seconds(1e15) == estimate.seconds(1e13) == 420
    slow = estimate.seconds(1e9)
    assert slow > 10_000, "a machine on which nothing is done in seven minutes"
    single = healing_estimate(
        HALF, SMALL, replace(asked, minutes=None, iterations=1), TrainedSize(1000, 0), CALIBRATION
    )
    assert slow == pytest.approx(single.seconds(1e9))
