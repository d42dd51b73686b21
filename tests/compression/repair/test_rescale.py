"""Scales fitted to a whole mixture."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_pico
from torch import nn

from ditmoe_cli.compression.repair.rescale import rescale
from ditmoe_cli.compression.replay.stream import Tokens
from ditmoe_cli.model.moe import SparseMoE


@pytest.fixture
def mixture() -> SparseMoE:
    moe = make_pico(sampler="rf", in_channels=1).model().blocks[0].moe
    assert isinstance(moe, SparseMoE)
    return moe


@pytest.fixture
def tokens(mixture: SparseMoE) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, mixture.gate.weight.shape[1], generator=generator)
    return Tokens(inputs, torch.rand(400, generator=generator), torch.arange(400) % 8 == 7)


def test_factors_are_found_again(mixture: SparseMoE, tokens: Tokens) -> None:
    changed = copy.deepcopy(mixture)
    factors = [0.5, 1.0, 3.0, 0.1]
    for expert, factor in zip(changed.experts, factors, strict=False):
        expert.down_proj.weight = nn.Parameter(expert.down_proj.weight * factor, requires_grad=False)
    with torch.inference_mode():
        assert rescale(mixture, changed, tokens) < 1e-6
    for expert, wanted in zip(changed.experts, mixture.experts, strict=True):
        torch.testing.assert_close(expert.down_proj.weight, wanted.down_proj.weight, rtol=1e-3, atol=1e-6)


def test_what_cannot_be_bettered_is_left_alone(mixture: SparseMoE, tokens: Tokens) -> None:
    changed = copy.deepcopy(mixture)
    with torch.inference_mode():
        assert rescale(mixture, changed, tokens) == 1.0
    for expert, wanted in zip(changed.experts, mixture.experts, strict=True):
        torch.testing.assert_close(expert.down_proj.weight, wanted.down_proj.weight, rtol=1e-6, atol=0)


def test_an_expert_that_no_token_reaches_keeps_its_size(mixture: SparseMoE, tokens: Tokens) -> None:
    chosen = mixture.gate(tokens.inputs).experts
    quiet = Tokens(*(part[~(chosen == 0).any(dim=1)] for part in (tokens.inputs, tokens.weights, tokens.held)))
    changed = copy.deepcopy(mixture)
    before = changed.experts[0].down_proj.weight.clone()
    changed.experts[1].down_proj.weight.mul_(0.5)
    with torch.inference_mode():
        rescale(mixture, changed, quiet)
    torch.testing.assert_close(changed.experts[0].down_proj.weight, before, rtol=1e-4, atol=0)
