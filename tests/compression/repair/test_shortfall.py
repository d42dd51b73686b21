"""What is lacking is the difference of both outputs, whatever these have in common."""

from __future__ import annotations

import copy

import pytest
import torch
from replaying import WIDTH, mixture, plain, reduced
from torch import nn
from torch.testing import assert_close

from ditmoe_cli.compression.repair import features
from ditmoe_cli.compression.repair import shortfall as lacking
from ditmoe_cli.compression.repair.features import FitTokens, Routes, fitted_terms, keep_features
from ditmoe_cli.compression.repair.refit import refit
from ditmoe_cli.compression.repair.shortfall import Routed, shortfall
from ditmoe_cli.compression.replay.outputs import output_of
from ditmoe_cli.compression.replay.stream import Tokens
from ditmoe_cli.model.config import BlockConfig
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.moe import RoutedExperts, SparseMoE

FIVE = BlockConfig(5, tuple(6 + e % 3 for e in range(5)), 12)


def some_tokens(count: int = 300) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(count, generator=generator) + 0.1
    return Tokens(torch.randn(count, WIDTH, generator=generator), weights, torch.arange(count) // 8 % 8 == 7)


def narrow(expert: nn.Module, neurons: list[int]) -> SwiGLU:
    assert isinstance(expert, SwiGLU)
    part = SwiGLU(WIDTH, len(neurons)).requires_grad_(False)
    part.gate_proj.weight.copy_(expert.gate_proj.weight[neurons])
    part.up_proj.weight.copy_(expert.up_proj.weight[neurons])
    part.down_proj.weight.copy_(expert.down_proj.weight[:, neurons])
    return part


def narrowed(moe: SparseMoE) -> SparseMoE:
    """Every expert with some of its neurons, the shared one too, in another order."""
    changed = copy.deepcopy(moe)
    changed.experts = RoutedExperts(narrow(expert, [4, 1, 2][: 2 + e % 2]) for e, expert in enumerate(moe.experts))
    changed.shared_experts = narrow(moe.shared_experts, [11, 3, 0, 7])
    return changed


def merged(moe: SparseMoE) -> SparseMoE:
    """Rows share two experts, of which one is an original one, and the other has another down projection."""
    result = mixture(BlockConfig(5, (6, 7), 12, mapped=True), selects=(0, 1, 0, 1, 0))
    result.gate.weight.copy_(moe.gate.weight)
    result.experts = RoutedExperts(copy.deepcopy(moe.experts[e]) for e in (0, 1))
    result.experts[1].down_proj.weight.mul_(2)
    return result


def with_constants(moe: SparseMoE) -> SparseMoE:
    result = mixture(
        BlockConfig(5, (6, 7), 12, mapped=True, constants=1, residual_constant=True), selects=(0, 1, -2, -2, 0)
    )
    result.gate.weight.copy_(moe.gate.weight)
    result.experts = RoutedExperts(copy.deepcopy(moe.experts[e]) for e in (0, 1))
    return result


CHANGES = {
    "unchanged": copy.deepcopy,
    "ghosts": lambda moe: reduced(moe, FIVE, (0, 2, 4), "ghost"),
    "sliced": lambda moe: reduced(moe, FIVE, (1, 2, 3), "slice"),
    "mass": lambda moe: reduced(moe, FIVE, (1, 2, 3), "mass"),
    "narrowed": narrowed,
    "merged": merged,
    "constants": with_constants,
    "another": lambda _: plain(seed=7),
}


def lacks(moe: SparseMoE, changed: SparseMoE, tokens: Tokens, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What is lacking, and what it should be, token by token in the order of the fit."""
    fitting = FitTokens(tokens)
    sides = [Routed(one, Routes.of(one, fitting)) for one in (moe, changed)]
    terms, common = fitted_terms(changed, sides[1].routes, fitting, shared=True)
    if keep:
        keep_features(terms, fitting)
    wanted = (output_of(moe, tokens.inputs) - output_of(changed, tokens.inputs)) * tokens.weights.sqrt()[:, None]
    return shortfall(sides[0], sides[1], terms, common, fitting), wanted[fitting.order]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("change", list(CHANGES))
def test_it_is_the_difference_of_both_outputs(change: str, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (features, lacking):
        monkeypatch.setattr(module, "_TOKENS", 40)
    moe = plain()
    found, wanted = lacks(moe, CHANGES[change](moe), some_tokens(), keep)
    assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert bool(wanted.any()) == (change != "unchanged")


def test_nothing_lacks_where_nothing_is_changed() -> None:
    """To the last bit: what is common is not computed at all."""
    moe = plain()
    found, _ = lacks(moe, copy.deepcopy(moe), some_tokens(), keep=True)
    assert not found.any()


def test_experts_with_equal_neurons_are_each_matched_once() -> None:
    moe = plain(experts=4)
    for name in ("gate_proj", "up_proj", "down_proj"):
        moe.experts[3].get_submodule(name).weight = moe.experts[0].get_submodule(name).weight
    found, wanted = lacks(
        moe, reduced(moe, BlockConfig(4, (6, 7, 8, 6), 12), (0, 1), "ghost"), some_tokens(), keep=True
    )
    assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bound", [0, 3000, 10**9])
def test_how_many_features_are_kept_changes_no_weight(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, results = plain(), []
    for kept in (10**9, bound):
        monkeypatch.setattr(features, "KEPT_FEATURES", kept)
        changed = reduced(copy.deepcopy(moe), FIVE, (0, 2, 4), "ghost")
        assert refit(moe, changed, some_tokens(), shared=True).error < 1
        results.append(changed.state_dict())
    for name, tensor in results[0].items():
        assert_close(results[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_batches_have_tokens_of_one_side_each() -> None:
    tokens = some_tokens()
    fitting = FitTokens(tokens)
    for batches, held in ((fitting.train, False), (fitting.held, True)):
        for batch in batches:
            assert bool((tokens.held[fitting.order[batch]] == held).all())
    assert sorted(fitting.order.tolist()) == list(range(len(tokens.inputs)))
    assert_close(fitting.inputs(slice(0, 9)), tokens.inputs[fitting.order[:9]])
