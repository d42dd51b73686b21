"""Errors of subsets against mixtures that are really rebuilt, and against closed forms."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replaying import error_by_hand, mixture, output, plain, reduced, some_tokens
from torch.testing import assert_close

from ditmoe_cli.compression.plan import RouterMode
from ditmoe_cli.compression.replay import subsets as replay
from ditmoe_cli.compression.replay.subsets import SubsetReplay
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.model.config import BlockConfig

MODES: tuple[RouterMode, ...] = ("ghost", "slice", "mass")
WIDTHS = (6, 7, 8, 6, 7)
# blocks that may have been compressed before: their configuration and router map
BLOCKS: dict[str, tuple[BlockConfig, tuple[int, ...]]] = {
    "plain": (BlockConfig(5, WIDTHS, 12), ()),
    "ghosts": (BlockConfig(7, WIDTHS, 12, mapped=True), (0, -1, 1, 2, 3, -1, 4)),
    "merged": (BlockConfig(8, WIDTHS, 12, mapped=True), (3, 0, 1, 2, 3, 0, 4, -1)),
    "mass": (BlockConfig(7, WIDTHS, 12, mapped=True, mass=True), (0, -1, 1, 2, 3, -1, 4)),
    "constants": (BlockConfig(7, WIDTHS, 12, mapped=True, constants=2, rank=1), (0, -2, 1, 2, 3, -3, 4)),
    "refitted": (
        BlockConfig(7, WIDTHS, 12, mapped=True, residual_constant=True, residual_linear=True),
        (0, 1, -1, 2, 3, 4, -1),
    ),
}


@pytest.mark.parametrize("kind", BLOCKS)
@settings(max_examples=8)
@given(
    branches=st.sampled_from([1, 2]),
    keep=st.sets(st.integers(0, 4), min_size=2),
    top_k=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_a_subsets_error_is_that_of_the_rebuilt_mixture(
    kind: str, branches: int, keep: set[int], top_k: int, seed: int
) -> None:
    config, selects = BLOCKS[kind]
    moe, tokens = mixture(config, top_k, selects, seed), some_tokens(branches=branches, seed=seed)
    subset, subsets = tuple(sorted(keep)), SubsetReplay(tokens, moe)
    for mode in MODES:
        rebuilt = reduced(moe, config, subset, mode)
        (found,) = subsets.errors([subset], mode).tolist()
        assert found == pytest.approx(error_by_hand(tokens, moe, rebuilt), rel=1e-4, abs=1e-9)


def test_mass_by_its_formula() -> None:
    moe, tokens, keep = plain(top_k=2), some_tokens(), (0, 2, 3)
    change = torch.zeros(len(tokens.inputs), 8)
    for i, u in enumerate(tokens.inputs):
        p = (moe.gate.weight @ u).softmax(dim=0)
        before = sorted(range(5), key=lambda e: -float(p[e]))[:2]
        after = sorted(keep, key=lambda e: -float(p[e]))[:2]
        scale = p[before].sum() / p[after].sum()
        change[i] = sum(scale * p[e] * moe.experts[e](u) for e in after) - sum(p[e] * moe.experts[e](u) for e in before)
    routed = output(moe, tokens) - moe.shared_experts(tokens.inputs)
    (found,) = SubsetReplay(tokens, moe).errors([keep], "mass").tolist()
    assert found == pytest.approx(tokens.energy(change) / tokens.energy(routed), rel=1e-4)


def test_many_candidates_and_tokens_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, tokens = plain(experts=6), some_tokens(pairs=11)
    subsets = [s for n in (2, 3, 4, 6) for s in itertools.combinations(range(6), n)]
    whole = {mode: SubsetReplay(tokens, moe).errors(subsets, mode) for mode in MODES}
    monkeypatch.setattr(replay, "_OUTPUTS", 4 * 6 * 8)  # two pairs at a time
    monkeypatch.setattr(replay, "_GATES", 100)
    parts = SubsetReplay(tokens, moe)
    for mode in MODES:
        assert_close(parts.errors(subsets, mode), whole[mode], rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_keeping_everything_costs_nothing(mode: RouterMode) -> None:
    tokens, moe = some_tokens(), plain()
    assert float(SubsetReplay(tokens, moe).errors([range(5)], mode)) < 1e-12


def test_experts_that_no_token_chose_are_free_where_gates_stay() -> None:
    tokens, moe = some_tokens(pairs=3, branches=1), plain(experts=8)
    chosen = sorted(set(moe.gate(tokens.inputs).experts.flatten().tolist()))
    assert len(chosen) < 8
    subsets = SubsetReplay(tokens, moe)
    assert float(subsets.errors([chosen], "ghost")) == 0.0
    assert float(subsets.errors([chosen], "mass")) < 1e-12
    assert float(subsets.errors([chosen], "slice")) > 1e-3


def test_a_block_that_adds_nothing_loses_nothing() -> None:
    tokens, moe = some_tokens(), plain()
    closed = replace(tokens, gamma=torch.zeros_like(tokens.gamma))
    assert SubsetReplay(closed, moe).errors([(0, 1), (2, 4)], "ghost").tolist() == [0.0, 0.0]


def test_fewer_rows_than_top_k_are_infeasible() -> None:
    with pytest.raises(InfeasibleError, match="top-2"):
        SubsetReplay(some_tokens(), plain()).errors([(0, 1), (3,)], "ghost")
    merged = mixture(BlockConfig(3, (6, 6), 12, mapped=True), 2, (0, 0, 1))
    assert len(SubsetReplay(some_tokens(), merged).errors([(0,)], "ghost")) == 1  # both of its rows
