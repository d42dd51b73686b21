"""Refitting: what it must leave alone, what it can make whole, and that it never does harm."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import make_pico
from torch import Tensor, nn

from ditmoe_cli.compression.rebuild import mixture_of
from ditmoe_cli.compression.repair import refit as module
from ditmoe_cli.compression.repair.outputs import held_error, output_of
from ditmoe_cli.compression.repair.refit import refit
from ditmoe_cli.compression.stream import Tokens
from ditmoe_cli.compression.transform import weights_of
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig
from ditmoe_cli.model.moe import SparseMoE

Ghost = Callable[..., SparseMoE]


@pytest.fixture
def config() -> DiTMoEConfig:
    return make_pico(sampler="rf", in_channels=1).config


@pytest.fixture
def original() -> SparseMoE:
    moe = make_pico(sampler="rf", in_channels=1).model().blocks[0].moe
    assert isinstance(moe, SparseMoE)
    return moe


@pytest.fixture
def tokens(original: SparseMoE) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1600, original.gate.weight.shape[1], generator=generator)
    return Tokens(inputs, torch.rand(1600, generator=generator) + 0.5, torch.arange(1600) % 8 == 7)


def ghosted(moe: SparseMoE, config: DiTMoEConfig, selects: list[int], beyond: bool = True) -> SparseMoE:
    """Return the mixture with rows selecting as told, of the experts that are left."""
    kept = [selects.index(new) for new in range(max(selects) + 1)]
    widths = tuple(moe.experts[e].down_proj.in_features for e in kept)
    shared = moe.shared_experts.down_proj.in_features
    block = BlockConfig(len(selects), widths, shared, True, residual_constant=beyond, residual_linear=beyond)
    weights: dict[str, Tensor] = {}
    for name, tensor in weights_of(copy.deepcopy(moe)).items():
        old = next((e for e in range(len(moe.experts)) if f".experts.{e}." in name), None)
        if old is None:
            weights[name] = tensor
        elif old in kept:
            weights[name.replace(f".experts.{old}.", f".experts.{kept.index(old)}.")] = tensor
    width = config.hidden_size
    if beyond:
        weights |= {"moe.residual_constant": torch.zeros(width), "moe.residual_linear": torch.zeros(width, width)}
    return mixture_of({**weights, "moe.gate.expert_of": torch.tensor(selects, dtype=torch.int32)}, config, block)


def test_an_unchanged_mixture_keeps_its_weights(original: SparseMoE, tokens: Tokens) -> None:
    same = copy.deepcopy(original)
    with torch.inference_mode():
        assert refit(original, same, tokens, shared=True).error == 1.0
    for name, tensor in weights_of(original).items():
        assert torch.equal(weights_of(same)[name], tensor), name


@pytest.mark.parametrize("largest", [6144, 70])
def test_dropping_experts_is_made_up_for(
    original: SparseMoE, config: DiTMoEConfig, tokens: Tokens, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST_SYSTEM", largest)
    pruned = ghosted(original, config, [0, 1, -1, -1])
    with torch.inference_mode():
        before = held_error(original, pruned, tokens)
        found = refit(original, pruned, tokens, shared=True)
        after = held_error(original, pruned, tokens)
    assert after < before
    assert found.error < 1
    assert len(found.strengths) > 1 or largest == 6144, "small systems are solved one after the other"


def test_a_linear_share_of_the_left_over_mass_is_recovered(
    original: SparseMoE, config: DiTMoEConfig, tokens: Tokens
) -> None:
    """The original adds m (c + L u) for the mass m that no row carries; the copy has lost it."""
    whole = ghosted(original, config, [0, 1, -1, -1])
    generator = torch.Generator().manual_seed(1)
    width = config.hidden_size
    whole._buffers["residual_constant"] = torch.randn(width, generator=generator)
    whole._buffers["residual_linear"] = torch.randn(width, width, generator=generator) * width**-0.5
    lost = ghosted(original, config, [0, 1, -1, -1])
    with torch.inference_mode():
        assert refit(whole, lost, tokens, shared=False).error < 1e-4
        torch.testing.assert_close(
            output_of(lost, tokens.inputs), output_of(whole, tokens.inputs), rtol=0.02, atol=0.02
        )


def test_down_projections_are_found_again(original: SparseMoE, tokens: Tokens) -> None:
    changed = copy.deepcopy(original)
    for expert in (*changed.experts, changed.shared_experts):
        noise = torch.randn(expert.down_proj.weight.shape, generator=torch.Generator().manual_seed(2))
        expert.down_proj.weight = nn.Parameter(expert.down_proj.weight + 0.1 * noise, requires_grad=False)
    with torch.inference_mode():
        assert refit(original, changed, tokens, shared=True).error < 1e-3


def test_without_the_shared_expert_it_stays_as_it_is(original: SparseMoE, config: DiTMoEConfig, tokens: Tokens) -> None:
    pruned = ghosted(original, config, [0, 1, -1, -1], beyond=False)
    with torch.inference_mode():
        refit(original, pruned, tokens, shared=False)
    for name, tensor in weights_of(original).items():
        if "shared" in name:
            assert torch.equal(weights_of(pruned)[name], tensor), name


def test_an_expert_that_no_token_reaches_is_left_alone(
    original: SparseMoE, config: DiTMoEConfig, tokens: Tokens
) -> None:
    chosen = original.gate(tokens.inputs).experts
    quiet = ~(chosen == 0).any(dim=1)
    few = Tokens(tokens.inputs[quiet], tokens.weights[quiet], torch.arange(int(quiet.sum())) % 8 == 7)
    pruned = ghosted(original, config, [0, 1, 2, -1])
    before = pruned.experts[0].down_proj.weight.clone()
    unreached = ~(pruned.gate(few.inputs).experts == 0).any(dim=1)
    few = Tokens(few.inputs[unreached], few.weights[unreached], few.held[unreached])
    with torch.inference_mode():
        refit(original, pruned, few, shared=True)
    assert torch.equal(pruned.experts[0].down_proj.weight, before)
    assert all(bool(tensor.isfinite().all()) for tensor in weights_of(pruned).values() if tensor.is_floating_point())
