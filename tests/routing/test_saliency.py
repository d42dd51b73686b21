"""Saliency criteria, held against their formulas on hand-made routing tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.routing.profile import RoutingTables, empty_tables
from ditmoe_cli.routing.saliency import Scores, easy_ep, frequency, gate_mass, man, msan, random, reap

Criterion = Callable[[RoutingTables], Scores]

EXPERTS, BINS = 4, 3
# sums over step bins and branches: the table that is summed, and whether selections divide it
SUMMED: dict[Criterion, tuple[str, bool]] = {
    reap: ("gate_norm", True),
    man: ("norm", True),
    msan: ("norm_square", True),
    easy_ep: ("easy_ep", False),
    gate_mass: ("gate_mass", False),
}
CRITERIA: tuple[Criterion, ...] = (*SUMMED, frequency)


@st.composite
def tables(draw: st.DrawFn) -> RoutingTables:
    """Tables of up to three blocks, some with fewer experts than the most; experts may never be chosen."""
    experts = tuple(draw(st.lists(st.integers(2, EXPERTS), min_size=1, max_size=3)))
    shape = (len(experts), 2, BINS, max(experts))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    selected = generator.integers(0, 50, shape) * generator.integers(0, 2, shape)
    for block, n in enumerate(experts):
        selected[block, ..., n:] = 0
    mass = selected * generator.uniform(0.1, 0.9, shape)
    norms = [(mass * generator.uniform(0.5, 20.0, shape)).tolist() for _ in range(4)]
    cfg = draw(st.sampled_from([0.0, 0.5, 1.0, 1.5, 4.0]))
    optional = dict(zip(("norm", "norm_square", "easy_ep"), norms[1:], strict=True))
    return RoutingTables(experts, BINS, cfg, selected.tolist(), mass.tolist(), norms[0], optional)


def table_of(tables: RoutingTables, name: str) -> np.ndarray:
    return np.array(tables.optional[name] if name in tables.optional else getattr(tables, name))


def mapped(tables: RoutingTables, change: Callable[[np.ndarray], np.ndarray]) -> RoutingTables:
    """Tables with a change made to every one of them."""
    required = {name: change(table_of(tables, name)).tolist() for name in ("selected", "gate_mass", "gate_norm")}
    optional = {name: change(np.array(table)).tolist() for name, table in tables.optional.items()}
    return replace(tables, **required, optional=optional)


def one_block(selected: list[list[list[float]]], norm: list[list[list[float]]], cfg: float = 1.0) -> RoutingTables:
    """Tables of one block, [branch][bin][expert] each."""
    optional = {name: [norm] for name in ("norm", "norm_square", "easy_ep")}
    return RoutingTables((len(selected[0][0]),), len(selected[0]), cfg, [selected], [norm], [norm], optional)


@pytest.mark.parametrize("criterion", SUMMED)
@given(tables())
def test_scores_are_sums_weighted_by_branch(criterion: Criterion, given_tables: RoutingTables) -> None:
    name, divided = SUMMED[criterion]
    weight = np.array([given_tables.cfg, abs(given_tables.cfg - 1)])
    total = np.einsum("w,lwbe->le", weight, table_of(given_tables, name))
    count = np.einsum("w,lwbe->le", weight, np.array(given_tables.selected))
    expected = np.where(count > 0, total / np.where(count > 0, count, 1), 0.0) if divided else total
    scores = criterion(given_tables)
    for block, n in enumerate(given_tables.experts):
        assert scores[block] == pytest.approx(expected[block, :n].tolist(), rel=1e-12)


# three tokens: expert 0 has gates .5 and .25 on norms 2 and 4, expert 1 gate .1 on norm 30; nothing chose expert 2
BY_HAND: dict[Criterion, tuple[list[float], list[float]]] = {
    reap: ([2.0, 3.0, 0.0], [1.0, 3.0, 0.0]),
    man: ([6.0, 30.0, 0.0], [3.0, 30.0, 0.0]),
    msan: ([20.0, 900.0, 0.0], [10.0, 900.0, 0.0]),
    gate_mass: ([0.75, 0.1, 0.0], [0.75, 0.1, 0.0]),
    easy_ep: ([0.5, 0.25, 0.0], [0.5, 0.25, 0.0]),
}


@pytest.mark.parametrize("criterion", BY_HAND)
def test_scores_of_three_tokens_by_hand(criterion: Criterion) -> None:
    sums, expected = BY_HAND[criterion]
    assert criterion(one_block([[[2, 1, 0]], [[0, 0, 0]]], [[sums], [[0.0] * 3]])) == [expected]


@pytest.mark.parametrize(("criterion", "name"), [(man, "norm"), (msan, "norm_square"), (easy_ep, "easy_ep")])
def test_a_table_that_the_profile_lacks_is_named(criterion: Criterion, name: str) -> None:
    known = one_block([[[2, 1]], [[0, 0]]], [[[1.0, 1.0]], [[0.0, 0.0]]])
    without = replace(known, optional={n: table for n, table in known.optional.items() if n != name})
    with pytest.raises(BadInputError, match=rf"no table '{name}'; profile without fast"):
        criterion(without)


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (1.0, 10 / 4),  # the conditional branch alone
        (0.0, 30 / 6),  # the unconditional branch alone
        (1.5, (1.5 * 10 + 0.5 * 30) / (1.5 * 4 + 0.5 * 6)),
        (4.0, (4 * 10 + 3 * 30) / (4 * 4 + 3 * 6)),
        (0.25, (0.25 * 10 + 0.75 * 30) / (0.25 * 4 + 0.75 * 6)),
    ],
)
def test_guidance_weighs_the_branches_as_it_weighs_their_outputs(cfg: float, expected: float) -> None:
    both = one_block([[[4, 1]], [[6, 1]]], [[[10.0, 1.0]], [[30.0, 1.0]]], cfg)
    assert reap(both)[0][0] == pytest.approx(expected)


def test_an_expert_that_only_the_unweighted_branch_chose_scores_nothing() -> None:
    unconditional_only = one_block([[[0, 5]], [[7, 5]]], [[[0.0, 5.0]], [[7.0, 5.0]]], cfg=1.0)
    assert reap(unconditional_only)[0] == [0.0, 1.0]


@given(tables(), st.floats(0.01, 100.0))
def test_reap_scales_with_the_outputs_and_not_with_the_number_of_tokens(scaled: RoutingTables, factor: float) -> None:
    louder = replace(scaled, gate_norm=(factor * np.array(scaled.gate_norm)).tolist())
    more = replace(
        scaled, gate_norm=(7 * np.array(scaled.gate_norm)).tolist(), selected=(7 * np.array(scaled.selected)).tolist()
    )
    for plain, loud, repeated in zip(reap(scaled), reap(louder), reap(more), strict=True):
        assert loud == pytest.approx([factor * score for score in plain])
        assert repeated == pytest.approx(plain)


@given(tables())
def test_frequency_is_the_share_of_all_selections(counted: RoutingTables) -> None:
    selected = np.array(counted.selected).sum(axis=(1, 2))
    scores = frequency(counted)
    for block, n in enumerate(counted.experts):
        total = selected[block].sum()
        assert scores[block] == pytest.approx([selected[block, e] / total if total else 0.0 for e in range(n)])
        assert math.fsum(scores[block]) == pytest.approx(1.0 if total else 0.0)


@given(tables(), st.permutations(range(BINS)))
def test_the_order_of_steps_does_not_matter(counted: RoutingTables, order: list[int]) -> None:
    shuffled = mapped(counted, lambda table: table[:, :, order])
    for criterion in CRITERIA:
        for a, b in zip(criterion(counted), criterion(shuffled), strict=True):
            assert a == pytest.approx(b)
    assert random(counted, 3) == random(shuffled, 3)


@given(tables(), st.permutations(range(2)))
def test_every_expert_is_scored_and_renamed_experts_alike(counted: RoutingTables, order: list[int]) -> None:
    swapped_order = [*order, *range(2, max(counted.experts))]
    swapped = mapped(counted, lambda table: table[..., swapped_order])
    for criterion in CRITERIA:
        scores = criterion(counted)
        assert [len(block) for block in scores] == list(counted.experts)
        assert all(math.isfinite(score) and score >= 0 for block in scores for score in block)
        for plain, renamed in zip(scores, criterion(swapped), strict=True):
            assert renamed == pytest.approx([plain[swapped_order[e]] for e in range(len(plain))])


def test_an_expert_that_no_token_chose_scores_zero() -> None:
    counted = one_block([[[3, 0]], [[1, 0]]], [[[2.0, 0.0]], [[1.0, 0.0]]], cfg=1.5)
    silent = one_block([[[0, 0]], [[0, 0]]], [[[0.0, 0.0]], [[0.0, 0.0]]])
    for criterion in CRITERIA:
        assert criterion(counted)[0][1] == 0.0 < criterion(counted)[0][0]
        assert criterion(silent) == [[0.0, 0.0]]


def test_frequency_does_not_depend_on_the_guidance_scale() -> None:
    selected, norms = [[[4, 1]], [[1, 4]]], [[[1.0, 1.0]], [[1.0, 1.0]]]
    assert frequency(one_block(selected, norms, cfg=4.0)) == frequency(one_block(selected, norms)) == [[0.5, 0.5]]


@given(st.integers(-(2**63), 2**63), st.lists(st.integers(1, 64), min_size=1, max_size=5))
def test_random_scores_depend_on_the_seed_alone(seed: int, experts: list[int]) -> None:
    drawn = random(empty_tables(tuple(experts)), seed)
    assert [len(block) for block in drawn] == experts
    filled = replace(empty_tables(tuple(experts)), cfg=4.0, selected=[[[[1.0] * 64]]] * len(experts))
    assert random(filled, seed) == drawn
    assert random(empty_tables(tuple(experts)), seed + 1) != drawn
    flat = [value for block in drawn for value in block]
    assert len(set(flat)) == len(flat)


def test_random_choices_are_even() -> None:
    best = [max(range(4), key=random(empty_tables((4,)), seed)[0].__getitem__) for seed in range(2000)]
    counts = [best.count(expert) for expert in range(4)]
    assert all(abs(count - 500) < 5 * math.sqrt(500 * 0.75) for count in counts), counts
