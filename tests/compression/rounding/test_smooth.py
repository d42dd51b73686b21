"""Smoothing: exact before rounding, by its formula, and written where it changed something."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import with_slow
from compressing import applied, formats_of, network, opened, outputs, profile_of, state
from conftest import make_pico
from torch.testing import assert_close

from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Experts, Formats, Rounding
from ditmoe_cli.compression.precision.uniform import plan_uniform
from ditmoe_cli.compression.rounding.smooth import block_scales, channel_scales, smooth_inputs, smoothed_names
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.dit import Block

SMOOTH = Rounding("gptq", 64, 0.5)


def block_of(extras: dict[str, Any]) -> Block:
    found = make_pico(hidden=32, extras=extras).model().blocks[1]
    assert isinstance(found, Block)
    return found


@pytest.mark.parametrize(
    "extras", [{}, {"residual_constant": True, "residual_linear": True}, {"constants": 2, "rank": 3}], ids=str
)
def test_a_block_stays_what_it_was(extras: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    block = block_of(extras)
    x, c = torch.randn(3, 16, 32, generator=generator), torch.randn(3, 32, generator=generator)
    sigma = torch.rand(32, generator=generator).mul(4).exp()
    with torch.no_grad():
        before, inputs = block(x, c, 1, None), block.attend(x, c).inputs
        smooth_inputs(block, sigma)
        after, smoothed = block(x, c, 1, None), block.attend(x, c).inputs
    assert_close(smoothed, inputs / sigma, rtol=1e-3, atol=1e-5)
    assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_scales_by_their_formula() -> None:
    largest = [torch.tensor([4.0, 1.0, 9.0]), torch.tensor([1.0, 16.0, 0.0])]
    weights = [torch.tensor([[1.0, -4.0, 1.0], [0.5, 1.0, 1.0]]), torch.tensor([[1.0, 1.0, 4.0]])]
    raw = [max((4 / 1) ** 0.5, 1.0), max((1 / 4) ** 0.5, 4.0), max(3.0, 0.0)]
    mean = (raw[0] * raw[1] * raw[2]) ** (1 / 3)
    assert_close(channel_scales(largest, weights, 0.5), torch.tensor(raw) / mean)
    assert_close(channel_scales(largest, weights, 1.0).prod(), torch.tensor(1.0))


def test_channels_without_inputs_or_weights_keep_their_scale() -> None:
    scales = channel_scales([torch.tensor([0.0, 2.0, 8.0])], [torch.tensor([[1.0, 1.0, 1.0]])], 1.0)
    assert_close(scales, torch.tensor([1.0, 0.5, 2.0]))
    assert_close(channel_scales([torch.zeros(3)], [torch.ones(1, 3)], 0.5), torch.ones(3))
    assert bool(channel_scales([torch.ones(3)], [torch.zeros(1, 3)], 0.5).isfinite().all())


def test_a_louder_channel_is_multiplied_into_the_weights() -> None:
    block, largest = block_of({}), torch.ones(4, 32)
    largest[2, 7] = 100.0
    sigma = block_scales(block, largest, 1.0)
    assert int(sigma.argmax()) == 7 and float(sigma[7] / sigma[8]) == pytest.approx(100.0, rel=1e-4)


@pytest.mark.parametrize("attention", with_slow(["flash", "timm"]))
def test_what_it_changes_is_written(attention: str, tmp_path: Path) -> None:
    original = opened(make_pico(attention=attention, hidden=32), tmp_path)
    profile = profile_of(original)
    plain = plan_uniform(original, "int8-g32", replace(SMOOTH, smoothing=0.0), profile.digest)
    smooth = plan_uniform(original, "int8-g32", SMOOTH, profile.digest)
    rough, fine = (
        applied(original, plan, tmp_path / f"{name}.safetensors", profile)
        for name, plan in (("plain", plain), ("smooth", smooth))
    )
    before, unsmoothed, after = state(original), state(rough), state(fine)
    names = {name for block in range(2) for name in smoothed_names(original, smooth.stage(Formats), block)}
    assert names == {
        f"blocks.{i}.{rest}"
        for i in range(2)
        for rest in ("adaLN_modulation.1.weight", "adaLN_modulation.1.bias", "moe.gate.weight")
    }
    plainly = {name for name, weight in original.weights.items() if name not in formats_of(plain)}
    assert {name for name in plainly if not torch.equal(before[name], after[name])} == names
    assert all(torch.equal(before[name], unsmoothed[name]) for name in plainly)
    exact, found = outputs(network(original)), outputs(network(fine))
    assert float((found - exact).norm() / exact.norm()) < 0.03


def test_smoothing_is_of_rounding_alone(tmp_path: Path) -> None:
    original = opened(make_pico(hidden=32), tmp_path)
    blocks = (BlockPlan((0, 1, 2), "ghost"),) * 2
    both = CompressionPlan("quantize", original.fingerprint, stages=(Experts(blocks), Formats(rounding=SMOOTH)))
    with pytest.raises(BadInputError, match="two plans"):
        applied(original, both, tmp_path / "o.safetensors")


def test_a_fast_profile_does_not_do(tmp_path: Path) -> None:
    original = opened(make_pico(hidden=32), tmp_path)
    profile = profile_of(original, fast=True)
    with pytest.raises(BadInputError, match="without fast"):
        applied(original, plan_uniform(original, "int8", SMOOTH), tmp_path / "o.safetensors", profile)
