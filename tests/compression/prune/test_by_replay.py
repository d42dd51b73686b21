"""Methods that choose by replay: searches over subsets, NAEE and DIET, held against brute force."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from replaying import error_by_hand, guided_by_hand, output, plain, reduced, some_tokens
from torch.testing import assert_close

from ditmoe_cli.compression.methods import SEARCHES
from ditmoe_cli.compression.plan import RouterMode
from ditmoe_cli.compression.prune import diet
from ditmoe_cli.compression.prune import subset_search as search
from ditmoe_cli.compression.prune.subset_search import best_subset
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.model.config import BlockConfig

MODES: tuple[RouterMode, ...] = ("ghost", "slice", "mass")
FIVE = BlockConfig(5, (6, 7, 8, 6, 7), 12)  # as plain() has it


@given(st.integers(1, 8).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))), st.integers(0, 99))
def test_few_subsets_are_all_tried(case: tuple[int, int], seed: int) -> None:
    experts, count = case
    draw = random.Random(seed)
    errors = {s: draw.randrange(4) for s in itertools.combinations(range(experts), count)}
    found = best_subset(experts, count, lambda subsets: [errors[s] for s in subsets])
    assert found == min(errors, key=lambda s: (errors[s], s))


@given(st.lists(st.integers(0, 9), min_size=16, max_size=24), st.integers(6, 10))
def test_greedy_search_is_exact_where_errors_add(costs: list[int], count: int) -> None:
    best = sorted(sorted(range(len(costs)), key=lambda e: -costs[e])[:count])
    found = best_subset(len(costs), count, lambda subsets: [lost(costs, s) for s in subsets])
    assert lost(costs, found) == lost(costs, best)
    assert list(found) == sorted(set(found)) and len(found) == count


def lost(costs: Sequence[int], kept: Sequence[int]) -> int:
    return sum(costs) - sum(costs[e] for e in kept)


def test_swaps_leave_where_dropping_one_by_one_ends() -> None:
    # dropping one by one keeps 0 to the end, and with it one other; the best pair is (1, 2)
    def error(subset: Sequence[int]) -> float:
        return 0.0 if set(subset) == {1, 2} else float(len(subset) < 3) + (0.5 if 0 not in subset else 0.25)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "EXACT", 0)
        assert best_subset(4, 2, lambda subsets: [error(s) for s in subsets]) == (1, 2)


@given(st.integers(0, 999))
def test_no_swap_improves_on_the_result(seed: int) -> None:
    def error(subset: Sequence[int]) -> float:
        return random.Random(f"{seed} {sorted(subset)}").random()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "EXACT", 0)
        found = best_subset(7, 3, lambda subsets: [error(s) for s in subsets])
    swapped = [{*found, new} - {old} for old in found for new in range(7) if new not in found]
    assert error(found) <= min(error(sorted(s)) for s in swapped)


@pytest.mark.parametrize("count", [0, 6])
def test_impossible_counts_are_infeasible(count: int) -> None:
    with pytest.raises(InfeasibleError, match=f"cannot keep {count} of 5 experts"):
        best_subset(5, count, lambda subsets: [0.0] * len(subsets))


@pytest.mark.parametrize(("mode", "branches"), [("ghost", 1), ("slice", 2), ("mass", 2)])
def test_naee_is_the_best_of_all_rebuilt_mixtures(branches: int, mode: RouterMode) -> None:
    for seed, count in ((0, 2), (1, 3)):
        moe, tokens = plain(seed=seed), some_tokens(branches=branches, seed=seed)
        subsets = itertools.combinations(range(5), count)
        expected = min(subsets, key=lambda s: error_by_hand(tokens, moe, reduced(moe, FIVE, s, mode)))
        assert SEARCHES["naee"].choose(tokens, moe, count, mode) == expected


def test_naee_of_many_experts_ends_where_no_swap_helps() -> None:
    moe, tokens = plain(experts=7), some_tokens()
    config = BlockConfig(7, tuple(6 + e % 3 for e in range(7)), 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "EXACT", 0)
        found = SEARCHES["naee"].choose(tokens, moe, 4, "ghost")
    neighbours = [sorted({*found, new} - {old}) for old in found for new in range(7) if new not in found]
    errors = [error_by_hand(tokens, moe, reduced(moe, config, s, "ghost")) for s in (found, *neighbours)]
    assert errors[0] <= min(errors) * (1 + 1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("branches", [1, 2])
def test_signatures_are_mean_changes_by_step_bin(branches: int, mode: RouterMode) -> None:
    moe, tokens = plain(), some_tokens(pairs=13, branches=branches, bins=3)
    found = diet.signatures(tokens, moe, mode)
    assert found.shape == (5, 3 * 8)
    for deleted in range(5):
        rest = [e for e in range(5) if e != deleted]
        change = output(reduced(moe, FIVE, rest, mode), tokens) - output(moe, tokens)
        guided = guided_by_hand(tokens, change)
        means = [guided[[i for i in range(13) if i % 3 == b]].mean(dim=0) for b in range(3)]
        assert_close(found[deleted], torch.cat(means), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_diet_keeps_one_of_each_pair_of_identical_experts(mode: RouterMode) -> None:
    moe = plain(experts=6, seed=2)
    for e in (1, 3, 5):
        moe.experts[e] = moe.experts[e - 1]
        moe.gate.weight[e] = moe.gate.weight[e - 1] + 1e-4 * torch.randn(8)
    for seed in range(3):
        kept = SEARCHES["diet"].choose(some_tokens(pairs=40, seed=seed), moe, 3, mode)
        assert [e // 2 for e in kept] == [0, 1, 2]


@given(st.integers(0, 99), st.integers(2, 4))
def test_diet_minimises_what_is_not_covered(seed: int, count: int) -> None:
    moe, tokens = plain(seed=seed), some_tokens(seed=seed)
    signatures = diet.signatures(tokens, moe, "ghost")

    def distance(i: int, j: int) -> float:
        return 1 - float(signatures[i] @ signatures[j] / (signatures[i].norm() * signatures[j].norm()))

    def uncovered(kept: Sequence[int]) -> float:
        return math.fsum(min(distance(i, j) for j in kept) for i in range(5) if i not in kept)

    found = SEARCHES["diet"].choose(tokens, moe, count, "ghost")
    best = min(map(uncovered, itertools.combinations(range(5), count)))
    assert uncovered(found) == pytest.approx(best, rel=1e-6)


def test_diet_drops_experts_that_change_nothing_first() -> None:
    tokens, moe = some_tokens(pairs=4, branches=1), plain(experts=8)
    chosen = sorted(set(moe.gate(tokens.inputs).experts.flatten().tolist()))
    assert 2 <= len(chosen) < 8
    assert set(SEARCHES["diet"].choose(tokens, moe, len(chosen), "ghost")) == set(chosen)


@pytest.mark.parametrize("name", SEARCHES)
def test_all_experts_may_be_kept_and_too_few_may_not(name: str) -> None:
    moe, tokens = plain(experts=3, top_k=3), some_tokens()
    assert SEARCHES[name].choose(tokens, moe, 3, "ghost") == (0, 1, 2)
    with pytest.raises(InfeasibleError):
        SEARCHES[name].choose(tokens, moe, 2, "ghost")
