"""Efforts of compressing by hand, what they are compared with the code, and how they grow."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from compressing import opened
from conftest import make_pico
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.compression.estimates import (
    carrying_out,
    fitted_tokens,
    matrix_rounding,
    measuring_estimate,
    profiling_estimate,
    refitting_estimate,
    replaying_estimate,
    rounding_estimate,
    system_effort,
)
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Experts, Formats, Repair, Rounding
from ditmoe_cli.compression.precision.uniform import plan_uniform
from ditmoe_cli.compression.working_sizes import systems
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.model.effort import branches_at, image_flops, mixture_flops
from ditmoe_cli.routing.calibration_settings import Calibration

SMALL = make_pico(hidden=32, depth=2, experts=4, input_size=4)


def test_a_system_by_hand() -> None:
    """Terms of 10 and 20 features on 100 and 400 rows of 400, 5 outputs; six factorisations with the last."""
    found = system_effort([10, 20], [100, 400], 5)
    assert found.flops == 100 * 10 * (10 + 2 * 20 + 4 * 10) + 400 * 20 * (20 + 4 * 10)
    assert found.double_flops == pytest.approx(6 * 30**3 / 3 + 30**2 * (4 * 5 * 5 + 2 * 5))


def test_large_systems_are_solved_in_single_precision() -> None:
    small, large = (system_effort([size], [100], 5) for size in (3072, 3073))
    assert small.double_flops > 0 and large.double_flops == 0
    assert large.flops > small.flops + small.double_flops / 2


def test_a_matrix_by_hand() -> None:
    """An (8, 16) matrix whose inputs are 100 tokens, of 50 operations each, beside the pooled 4,096."""
    found = matrix_rounding(8, 16, 100, 50)
    columns, scales = 8 * 16**2 + 2 * 16**3 / 3, 1_700 * 8 * 16
    assert found.flops == pytest.approx(4196 * (16**2 + 50) + columns + 6 * 8 * 16 * 12.5 + scales)
    assert not found.double_flops, "fp32 throughout"


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 120))
def test_systems_are_few_in_order_and_within_the_bound(sizes: list[int], largest: int) -> None:
    groups = systems(sizes, largest)
    parts = [sizes[group] for group in groups]
    assert [size for part in parts for size in part] == sizes and all(parts)
    assert all(sum(part) <= largest or len(part) == 1 for part in parts)
    assert all(sum(part) + after[0] > largest for part, after in pairwise(parts))


def test_tokens_to_fit_on_are_bounded_unless_asked_for() -> None:
    assert [fitted_tokens(unknowns, 32) for unknowns in (1, 1000, 10**6)] == [20_480, 32_000, 65_536]
    assert fitted_tokens(10**6, 32, asked=7) == 7
    assert [branches_at(cfg) for cfg in (1.0, 1.5, 4.0)] == [1, 2, 2]


def test_profiling_is_images_times_steps_times_branches() -> None:
    spec = SampleSpec(images=8, steps=5, cfg=1.0, seed=0, solver="euler", classes=())
    alone, guided = (
        profiling_estimate(SMALL.config, Calibration(replace(spec, cfg=cfg), fast=True)) for cfg in (1.0, 2.0)
    )
    assert alone.effort.flops == pytest.approx(1.1 * 8 * 5 * image_flops(SMALL.config))
    assert guided.effort.flops == pytest.approx(2 * alone.effort.flops) and guided.memory > alone.memory
    assert alone.what == "profiling 8 images in 5 steps"


def test_comparing_experts_takes_all_of_them_on_some_tokens() -> None:
    spec = SampleSpec(images=8, steps=5, cfg=1.0, seed=0, solver="euler", classes=())
    fast = profiling_estimate(SMALL.config, Calibration(spec, fast=True)).effort.flops
    width, block = SMALL.config.hidden_size, SMALL.config.blocks[0]
    assert SMALL.config.blocks == (block,) * SMALL.config.depth
    for reservoir, tokens, batch in ((100, 100, 100), (1000, 1000, 256), (10**6, 4096, 256)):
        found = profiling_estimate(SMALL.config, Calibration(spec, reservoir=reservoir)).effort.flops - fast
        each = 6 * tokens * width * sum(block.expert_widths) + 2 * len(block.expert_widths) * tokens * batch * width
        assert found == pytest.approx(SMALL.config.depth * each)


def test_refitting_grows_with_depth_tokens_and_branches() -> None:
    blocks = SMALL.config.blocks
    base = refitting_estimate(SMALL.config, blocks, 1, Repair(tokens=1024))
    more = refitting_estimate(SMALL.config, blocks, 1, Repair(tokens=4096))
    guided = refitting_estimate(SMALL.config, blocks, 2, Repair(tokens=1024))
    assert more.effort.flops > 3 * base.effort.flops and more.memory > base.memory
    assert guided.effort.flops == pytest.approx(2 * base.effort.flops, rel=0.01)
    half = replace(SMALL.config, depth=1, blocks=blocks[:1])
    assert base.effort.flops == pytest.approx(
        2 * refitting_estimate(half, blocks[:1], 1, Repair(tokens=1024)).effort.flops
    )
    rescaled = refitting_estimate(SMALL.config, blocks, 1, Repair(tokens=1024, scale=True))
    assert rescaled.effort.double_flops == 0 < base.effort.double_flops
    assert (base.what, refitting_estimate(half, blocks[:1], 1, Repair()).what) == (
        "refitting 2 blocks",
        "refitting 1 block",
    )


def test_measuring_grows_with_formats_and_with_depth() -> None:
    def effort(depth: int, count: int) -> float:
        pico = make_pico(hidden=32, depth=depth, experts=4, input_size=4)
        formats = {name: count for name in pico.state if name.endswith("proj.weight") and name.startswith("blocks.")}
        return measuring_estimate(pico.config, formats, 1).effort.flops

    assert effort(2, 1) < effort(2, 2)
    assert effort(16, 1) == pytest.approx(2 * effort(8, 1), rel=0.1), (
        "streams start at four blocks, however many there are"
    )


def test_a_plan_takes_what_its_stages_take(tmp_path: Path) -> None:
    checkpoint = opened(SMALL, tmp_path)
    nearest = plan_uniform(checkpoint, "int4-g64")
    assert [each.what for each in carrying_out(checkpoint, nearest, 1000)] == ["writing"]
    assert [each.what for each in carrying_out(checkpoint, None, 1000)] == ["writing"]
    (stage,) = (stage for stage in nearest.stages if isinstance(stage, Formats))
    rounded = replace(nearest, stages=(replace(stage, rounding=Rounding()),))
    first, _ = carrying_out(checkpoint, rounded, 1000)
    assert first.what == f"rounding {len(stage.formats)} matrices in 2 blocks"
    assert first == rounding_estimate(checkpoint, rounded.stages[0], 1)  # type: ignore[arg-type]
    guided, _ = carrying_out(checkpoint, replace(rounded, calibration={"cfg": 2.0}), 1000)
    assert guided.effort.flops > first.effort.flops
    experts = Experts((BlockPlan((0, 1), "ghost", constants=True),) * 2, None, Repair(tokens=512))
    refitted = CompressionPlan("prune", checkpoint.fingerprint, None, {}, stages=(experts,))
    assert [each.what for each in carrying_out(checkpoint, refitted, 1000)] == ["refitting 2 blocks", "writing"]


def test_replaying_computes_every_expert_on_every_token() -> None:
    """Four experts of width H on one token: 6 · 4 D H, 2 · 4² D products for a branch, and the mixture as it is."""
    config, block = SMALL.config, SMALL.config.blocks[0]
    width, hidden = config.hidden_size, block.expert_widths[0]
    alone = replaying_estimate(config, 1, 1).effort.flops
    assert alone == config.depth * (6 * 4 * width * hidden + 2 * 16 * width + mixture_flops(config, block))
    assert replaying_estimate(config, 10, 1).effort.flops == 10 * alone
    assert replaying_estimate(config, 10, 1).what == "replaying 2 blocks"
