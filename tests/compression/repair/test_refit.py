"""Down projections solved anew: what is representable is found, nothing gets worse, and nothing to do does nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replaying import WIDTH, mixture, plain, reduced
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.compression.algebra import ridge
from ditmoe_cli.compression.repair import refit as refitting
from ditmoe_cli.compression.repair.refit import refit
from ditmoe_cli.compression.replay.stream import Tokens
from ditmoe_cli.model.config import BlockConfig
from ditmoe_cli.model.moe import SparseMoE

FIVE = BlockConfig(5, tuple(6 + e % 3 for e in range(5)), 12)
RESIDUALS = {"residual_constant": True, "residual_linear": True}


def some_tokens(count: int = 800, seed: int = 0) -> Tokens:
    """Random tokens of images of 8; every eighth image is held out."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, WIDTH, generator=generator)
    weights = torch.rand(count, generator=generator) + 0.1
    return Tokens(inputs, weights / weights.mean(), torch.arange(count) // 8 % 8 == 7)


def output(moe: SparseMoE, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = moe(inputs[None], 0, inputs[:1], None)
    return out[0].double()


def error(original: SparseMoE, changed: SparseMoE, tokens: Tokens, held: bool = True) -> float:
    """Σ w ‖y - y'‖² over tokens that are held out, or that are not, over Σ w ‖y‖²."""
    mine = tokens.held if held else ~tokens.held
    wanted, found = (output(moe, tokens.inputs[mine]) for moe in (original, changed))
    weights = tokens.weights[mine].double()
    return float(weights @ (wanted - found).square().sum(dim=1) / (weights @ wanted.square().sum(dim=1)))


def with_residuals(moe: SparseMoE) -> SparseMoE:
    """The mixture with a residual constant and linear map of 0."""
    moe.residual_constant, moe.residual_linear = torch.zeros(WIDTH), torch.zeros(WIDTH, WIDTH)
    return moe


def ghosted(moe: SparseMoE, keep: tuple[int, ...]) -> SparseMoE:
    """A copy with the experts `keep`, the other rows ghosts, and residual maps to be fitted."""
    return with_residuals(reduced(copy.deepcopy(moe), FIVE, keep, "ghost"))


def disturbed(moe: SparseMoE, seed: int) -> SparseMoE:
    """A copy whose down projections, the shared one's too, and residual maps are other ones."""
    generator = torch.Generator().manual_seed(seed)
    changed = copy.deepcopy(moe)
    for name, tensor in (*changed.named_parameters(), *changed.named_buffers()):
        if "down_proj" in name or "residual" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return changed


@pytest.mark.parametrize("shared", [True, False])
def test_what_is_unchanged_stays_as_it_is(shared: bool) -> None:
    moe = plain()
    changed = copy.deepcopy(moe)
    found = refit(moe, changed, some_tokens(), shared)
    assert found.error == 1.0 and found.strengths == ()
    before, after = moe.state_dict(), changed.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "config",
    [
        FIVE,
        BlockConfig(5, (6, 7, 8, 6, 7), 12, **RESIDUALS),
        BlockConfig(4, (6, 8), 5, mapped=True, mass=True, constants=1, residual_linear=True),
    ],
    ids=["plain", "residuals", "constants and mass"],
)
def test_other_down_projections_are_solved_back(config: BlockConfig, seed: int) -> None:
    moe = mixture(config, selects=(0, -2, -1, 1) if config.mapped else (), seed=seed)
    changed, tokens = disturbed(moe, seed + 1), some_tokens(seed=seed)
    assert error(moe, changed, tokens) > 0.1
    found = refit(moe, changed, tokens, shared=True)
    assert found.error < 1e-6
    assert error(moe, changed, tokens) < 1e-8
    for name, tensor in changed.state_dict().items():
        assert_close(tensor, moe.state_dict()[name], rtol=1e-2, atol=1e-2)


def test_the_shared_expert_is_left_alone_unless_asked_for() -> None:
    moe, tokens = plain(), some_tokens()
    changed = disturbed(moe, 1)
    shared = changed.shared_experts.down_proj.weight.clone()
    alone = refit(moe, changed, tokens, shared=False)
    assert torch.equal(changed.shared_experts.down_proj.weight, shared)
    assert 0.01 < alone.error < 1
    assert refit(moe, changed, tokens, shared=True).error < 1e-6


def test_nothing_but_down_projections_and_residuals_is_touched() -> None:
    moe = with_residuals(plain())
    changed = disturbed(moe, 1)
    refit(moe, changed, some_tokens(), shared=True)
    before, after = moe.state_dict(), changed.state_dict()
    fixed = [name for name in before if not ("down_proj" in name or "residual" in name)]
    assert len(fixed) == 1 + 2 * 6
    assert all(torch.equal(before[name], after[name]) for name in fixed)


def linear_pair() -> tuple[SparseMoE, SparseMoE]:
    """Two experts, both selected, the second linear in u where u_0 = 1; and the first alone, with residual maps."""
    moe = mixture(BlockConfig(2, (6, 8), 12), top_k=2, seed=3)
    gate = moe.experts[1].gate_proj.weight
    gate.zero_()
    gate[:, 0] = 1.5  # silu(1.5) is a factor now
    alone = mixture(BlockConfig(2, (6,), 12, mapped=True, **RESIDUALS), top_k=1, selects=(0, -1))
    with_residuals(alone)
    alone.gate.weight.copy_(moe.gate.weight)
    alone.experts[0], alone.shared_experts = copy.deepcopy(moe.experts[0]), copy.deepcopy(moe.shared_experts)
    return moe, alone


def test_a_dropped_expert_that_is_linear_becomes_the_residual_map() -> None:
    """The mass that the first does not carry is that of the second: 1 - g_0 = g_1."""
    moe, alone = linear_pair()
    tokens = some_tokens()
    tokens.inputs[:, 0] = 1.0
    before = error(moe, alone, tokens)
    assert before > 0.05
    assert refit(moe, alone, tokens, shared=True).error < 1e-6
    assert error(moe, alone, tokens) < 1e-8 * before
    linear, constant = alone.residual_linear, alone.residual_constant
    assert linear is not None and constant is not None
    fresh = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(9))
    fresh[:, 0] = 1.0
    assert_close(fresh @ linear.T + constant, moe.experts[1](fresh), rtol=1e-2, atol=1e-2)


def test_without_residual_maps_the_same_expert_is_lost() -> None:
    moe, alone = linear_pair()
    tokens = some_tokens()
    tokens.inputs[:, 0] = 1.0
    alone.residual_linear = alone.residual_constant = None
    assert refit(moe, alone, tokens, shared=False).error > 0.01


def test_experts_that_share_their_neurons_merge_without_loss() -> None:
    """Of two experts that differ in their down projections by nothing but a token's own, one is enough."""
    moe = plain(experts=4, top_k=1)
    for name in ("gate_proj", "up_proj", "down_proj"):
        for kept, gone in ((0, 2), (1, 3)):
            moe.experts[gone].get_submodule(name).weight = moe.experts[kept].get_submodule(name).weight
    merged = mixture(BlockConfig(4, (6, 7), 12, mapped=True), top_k=1, selects=(0, 1, 0, 1))
    merged.gate.weight.copy_(moe.gate.weight)
    merged.experts = type(moe.experts)(copy.deepcopy(moe.experts[e]) for e in (0, 1))
    merged.shared_experts = copy.deepcopy(moe.shared_experts)
    for expert in merged.experts:
        expert.down_proj.weight.zero_()
    tokens = some_tokens()
    assert refit(moe, merged, tokens, shared=True).error < 1e-6
    assert error(moe, merged, tokens) < 1e-8


@settings(max_examples=20)
@given(seed=st.integers(0, 999), count=st.sampled_from([64, 96, 200, 800]), keep=st.sets(st.integers(0, 4), min_size=2))
def test_held_out_tokens_never_fare_worse(seed: int, count: int, keep: set[int]) -> None:
    """With fewer tokens than unknowns too, where the strength has to see to it."""
    moe, tokens = plain(seed=seed), some_tokens(count, seed)
    changed = ghosted(moe, tuple(sorted(keep)))
    before = error(moe, changed, tokens)
    found = refit(moe, changed, tokens, shared=True)
    assert error(moe, changed, tokens) <= before
    assert found.error <= 1.0
    assert (found.strengths == ()) == (error(moe, changed, tokens) == before)


def test_the_error_that_is_told_is_of_tokens_that_were_not_fitted() -> None:
    """On held-out noise a fit is no better than nothing, however well it does on the tokens it saw."""
    moe, tokens = plain(), some_tokens(96)
    other = plain(seed=5)
    inputs = tokens.inputs.clone()
    inputs[tokens.held] *= -1
    found = refit(other, copy.deepcopy(moe), Tokens(inputs, tokens.weights, tokens.held), shared=True)
    honest = refit(other, copy.deepcopy(moe), Tokens(inputs, tokens.weights, ~tokens.held), shared=True)
    assert found.error > 0.05 and honest.error > 0.05


def grouped(largest: int, change: Callable[[], SparseMoE], moe: SparseMoE, tokens: Tokens) -> tuple[int, float, float]:
    """The number of systems solved, the error told and the held-out error, of systems of at most `largest`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refitting, "most_unknowns", lambda _: largest)
        changed = change()
        found = refit(moe, changed, tokens, shared=True)
    return len(found.strengths), found.error, error(moe, changed, tokens)


@pytest.mark.parametrize("seed", range(3))
def test_terms_solved_in_groups_help_too(seed: int) -> None:
    moe, tokens, keep = plain(seed=seed), some_tokens(seed=seed), (0, 2, 4)
    before = error(moe, ghosted(moe, keep), tokens)
    whole, parts, single = (grouped(n, lambda: ghosted(moe, keep), moe, tokens) for n in (6144, 20, 1))
    assert whole[0] == 1
    # 6 8 7 neurons | 12 shared, 8 linear | 1 constant; and six terms of their own, each twice over
    assert 2 <= parts[0] <= 6 and 2 <= single[0] <= 12
    for count, told, found in (whole, parts, single):
        assert count and told < 1
        assert found < 0.95 * before
    assert max(parts[2], single[2]) < 1.5 * whole[2]


def test_groups_solve_what_one_system_does_where_terms_do_not_meet() -> None:
    """Top-1 routing: no token has two experts, so solving one after the other is solving all at once."""
    moe, tokens = plain(top_k=1), some_tokens()
    changed = copy.deepcopy(moe)
    for expert in changed.experts:
        expert.down_proj.weight.zero_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refitting, "most_unknowns", lambda _: 1)
        refit(moe, changed, tokens, shared=False)
    assert error(moe, changed, tokens) < 1e-8


@pytest.mark.parametrize("largest", [6144, 1])
def test_an_expert_that_no_token_selects_stays_as_it_is(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refitting, "most_unknowns", lambda _: largest)
    moe, tokens = plain(), some_tokens()
    tokens.inputs[:, 0] = 3.0
    for m in (changed := disturbed(moe, 1), moe):
        m.gate.weight[2] = 0
        m.gate.weight[2, 0] = -20.0
    assert not (moe.gate(tokens.inputs).experts == 2).any()
    before = changed.experts[2].down_proj.weight.clone()
    found = refit(moe, changed, tokens, shared=True)
    assert found.error < 0.1
    assert torch.equal(changed.experts[2].down_proj.weight, before)
    assert all(bool(tensor.isfinite().all()) for tensor in changed.state_dict().values())


def test_tokens_without_weight_and_tokens_of_nothing_break_nothing() -> None:
    moe = plain()
    for weights, inputs in ((0.0, 1.0), (1.0, 0.0)):
        tokens = some_tokens()
        changed = ghosted(moe, (0, 1))
        before = {name: tensor.clone() for name, tensor in changed.state_dict().items()}
        found = refit(moe, changed, Tokens(inputs * tokens.inputs, weights * tokens.weights, tokens.held), shared=True)
        assert found.error == 1.0
        assert all(torch.equal(before[name], tensor) for name, tensor in changed.state_dict().items())


def test_tokens_count_by_their_weight() -> None:
    """Two halves that cannot both be served: the heavy one is."""
    moe, tokens = plain(), some_tokens()
    heavy = torch.arange(len(tokens.inputs)) // 16 % 2 == 0
    errors = []
    for factor in (1e-3, 1e3):
        weights = torch.where(heavy, factor, 1.0)
        changed = ghosted(moe, (1, 2))
        refit(moe, changed, Tokens(tokens.inputs, weights, tokens.held), shared=True)
        errors.append(error(moe, changed, Tokens(tokens.inputs, torch.ones(len(weights)), heavy)))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("largest", [10**9, 20, 1])
def test_directions_of_the_output_choose_for_all_of_it(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a trial on half of the directions are fitted to all: nearly as good as a trial on all."""
    monkeypatch.setattr(refitting, "most_unknowns", lambda _: largest)
    moe, tokens, keep, errors = plain(), some_tokens(), (0, 2, 4), []
    before = error(moe, ghosted(moe, keep), tokens)
    for directions in (WIDTH, WIDTH // 2):
        monkeypatch.setattr(refitting, "TRIAL_OUTPUTS", directions)
        changed = ghosted(moe, keep)
        found = refit(moe, changed, tokens, shared=True)
        assert found.error < 1
        errors.append(error(moe, changed, tokens))
    assert errors[1] < 1.1 * errors[0] < before


@pytest.mark.parametrize("largest", [10**9, 20, 1])
def test_float32_fits_as_float64_does(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refitting, "most_unknowns", lambda _: largest)
    moe, tokens, keep, errors = plain(), some_tokens(), (0, 2, 4), []
    for bound in (3072, 0):
        monkeypatch.setattr(ridge, "DOUBLE_FEATURES", bound)
        changed = ghosted(moe, keep)
        assert refit(moe, changed, tokens, shared=True).error < 1
        errors.append(error(moe, changed, tokens))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
