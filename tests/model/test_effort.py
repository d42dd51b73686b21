"""Operations and memory by hand, and how they grow."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import make_pico
from torch.utils.flop_counter import FlopCounterMode

from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig
from ditmoe_cli.model.effort import (
    BASELINE_BYTES,
    Effort,
    WeakModel,
    attention_flops,
    block_weights,
    evaluation_flops,
    image_flops,
    mixture_flops,
    model_bytes,
    passes,
    passes_estimate,
    sampling_estimate,
    total,
)

XL = BlockConfig(router_rows=8, expert_widths=(4608,) * 8, shared_width=9216)


def config(width: int = 1152, depth: int = 28, block: BlockConfig = XL, side: int = 32) -> DiTMoEConfig:
    return DiTMoEConfig(
        input_size=side,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        hidden_size=width,
        depth=depth,
        num_heads=16,
        num_classes=1000,
        top_k=2,
        attention="timm",
        sampler="rf",
        blocks=(block,) * depth,
    )


def test_operations_of_an_xl_block_by_hand() -> None:
    """256 tokens of width 1152; two of eight experts of 4608 neurons, and a shared one of 9216."""
    assert attention_flops(config()) == 256 * (8 * 1152**2 + 4 * 256 * 1152) + 12 * 1152**2
    assert mixture_flops(config(), XL) == 2 * 8 * 1152 + 6 * 2 * 1152 * 4608 + 6 * 1152 * 9216
    linear = replace(XL, residual_linear=True)
    assert mixture_flops(config(), linear) - mixture_flops(config(), XL) == 2 * 1152**2


def test_experts_of_different_widths_count_by_their_mean() -> None:
    uneven = replace(XL, expert_widths=(100, 300), router_rows=8)
    assert mixture_flops(config(), uneven) == mixture_flops(config(), replace(XL, expert_widths=(200,)))


def test_torch_counts_as_many_operations_of_products() -> None:
    """Its counter sees the products of a forward pass, on the meta device."""
    import torch

    from ditmoe_cli.model.dit import DiTMoE

    pico = make_pico(hidden=64, depth=2, experts=4)
    model = DiTMoE(pico.config).eval()
    size, channels = pico.config.input_size, pico.config.in_channels
    images = 8
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(images, channels, size, size), torch.rand(images), torch.zeros(images, dtype=torch.long))
    assert counter.get_total_flops() == pytest.approx(images * image_flops(pico.config), rel=0.05)


def test_an_evaluation_counts_the_slots_of_each_expert() -> None:
    """Where all experts are as wide, slots may lie anywhere; an expert's neuron costs 6 D a slot."""
    whole, images = config(depth=2), 3
    slots = images * whole.num_patches * whole.top_k
    even = [[slots // 8] * 8, [slots, *[0] * 7]]
    assert evaluation_flops(whole, images, even) == pytest.approx(images * image_flops(whole))
    uneven = config(depth=1, block=replace(XL, expert_widths=(100, 300), router_rows=2))
    some, other = (evaluation_flops(uneven, images, [counts]) for counts in ([slots - 5, 5], [slots - 6, 6]))
    assert other - some == pytest.approx(6 * 1152 * 200)
    empty = evaluation_flops(uneven, images, [[0, 0]])
    assert some - empty == pytest.approx(6 * 1152 * (100 * (slots - 5) + 300 * 5))


def test_weights_are_those_of_the_matrices() -> None:
    pico = make_pico(hidden=32, depth=1)
    matrices = sum(t.numel() for name, t in pico.state.items() if name.startswith("blocks.") and t.dim() == 2)
    assert block_weights(pico.config, pico.config.blocks[0]) == matrices


def test_work_grows_with_depth_images_and_evaluations() -> None:
    small, deep = (passes(config(depth=depth), 8, 10, 4) for depth in (1, 2))
    assert 1.9 * small.flops < deep.flops < 2 * small.flops and deep.steps == 2 * small.steps
    assert passes(config(), 16, 10, 4).flops == 2 * passes(config(), 8, 10, 4).flops
    assert passes(config(), 8, 20, 4).flops == 2 * passes(config(), 8, 10, 4).flops
    assert passes(config(), 8, 10, 8).steps < passes(config(), 8, 10, 4).steps
    assert image_flops(config(side=64)) > 4 * image_flops(config(side=32)), "attention grows with the square"


def test_efforts_add_up() -> None:
    one, other = Effort(7e9, 3.5e9, 1000, 4e8), Effort(flops=7e9)
    assert total([one, other]) == one + other == Effort(14e9, 3.5e9, 1000, 4e8)
    assert one * 2 == one + one
    assert total([]) == Effort()
    assert one.seconds(1e10) == pytest.approx(7 / (0.7 * 10) + 3.5 / (0.35 * 10) + 0.006 + 1.0)
    assert one.seconds(2e10) < one.seconds(1e10)


def test_memory_of_sampling_is_the_model_and_a_batch() -> None:
    found = sampling_estimate(config(depth=1), images=64, nfe=10, batch=4)
    assert found.what == "sampling 64 images"
    token = 12 * 1152 + 2 * (2 * 4608 + 1152) + 2 * 9216
    assert found.memory == BASELINE_BYTES + model_bytes(config(depth=1)) + 4 * 8 * 256 * token
    assert sampling_estimate(config(depth=1), 64, 10, 8).memory > found.memory
    assert sampling_estimate(config(depth=2), 64, 10, 4).memory > found.memory


@pytest.mark.parametrize("shared", [False, True])
def test_a_weaker_model_adds_its_evaluations_and_its_weights_where_they_are_its_own(shared: bool) -> None:
    weak = WeakModel(config(depth=2), 10, shared)
    for alone, guided, images in (
        (sampling_estimate(config(), 64, 16, 4), sampling_estimate(config(), 64, 16, 4, weak), 64),
        (passes_estimate(config(), 8, 2, 3), passes_estimate(config(), 8, 2, 3, weak), 8),
    ):
        own = 0 if shared else model_bytes(config(depth=2))
        assert guided.what == alone.what
        assert guided.memory == alone.memory + own
        assert guided.effort.flops == alone.effort.flops + images * 10 * image_flops(config(depth=2))
        assert guided.effort.nbytes == alone.effort.nbytes + own


def test_passes_of_a_batch_are_those_of_its_images_in_each_branch() -> None:
    """Three passes of 8 images at guidance 2 evaluate each image six times, 16 rows at once."""
    alone, guided = (passes_estimate(config(), 8, branches, 3) for branches in (1, 2))
    assert alone.effort.flops == 3 * 8 * image_flops(config()) and guided.effort.flops == 2 * alone.effort.flops
    assert guided.memory > alone.memory > BASELINE_BYTES + model_bytes(config())
    assert alone.what == "3 passes of 8 images"
