"""What a map takes: operations by hand."""

from __future__ import annotations

import pytest
from conftest import make_pico

from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.model.compute_cost import block_cost, expert_cost, shared_cost
from ditmoe_cli.model.effort import ends_flops, image_flops
from ditmoe_cli.routing.sensitivity.map_effort import map_estimate, state_flops
from ditmoe_cli.routing.sensitivity.sensitivity_map import PARTS


def test_operations_are_those_of_blocks_behind_and_of_the_part_itself() -> None:
    config = make_pico().config
    block = config.blocks[0]
    ends, behind = ends_flops(config), block_cost(config, block)
    assert state_flops(config, ("skip",)) == pytest.approx(image_flops(config) + 2 * ends + behind)
    alone = state_flops(config, ("skip-shared",)) - state_flops(config, ("skip",))
    more = state_flops(config, ("skip-attention",)) - state_flops(config, ("skip-shared",))
    assert more == pytest.approx(2 * config.num_patches * shared_cost(config, block))
    less = alone - (state_flops(config, ("top1",)) - state_flops(config, ("skip",)))
    slot = config.num_patches * (expert_cost(config, block) - shared_cost(config, block))
    assert less == pytest.approx(2 * slot)


def test_effort_grows_with_states_and_branches() -> None:
    config = make_pico().config
    spec = SampleSpec(16, 20, 1.0, 0, "ddim", (0,))
    one, guided = (
        map_estimate(config, each, 20, tuple(PARTS), 8).effort.flops
        for each in (spec, SampleSpec(16, 20, 1.5, 0, "ddim", (0,)))
    )
    assert guided == pytest.approx(2 * one)
    fewer = map_estimate(config, spec, 5, tuple(PARTS), 8)
    assert fewer.effort.flops < one / 2
    assert fewer.what == "leaving out 5 parts of 2 blocks at 80 states"
