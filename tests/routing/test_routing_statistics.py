"""Statistics of routing counts: closed forms, invariances, and what happens without any counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import jensenshannon

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.routing import statistics as rs

LOAD = (
    rs.normalised_entropy,
    rs.effective_experts,
    rs.gini,
    rs.coefficient_of_variation,
    rs.max_violation,
    rs.chance_agreement,
)
some_counts = arrays(np.int64, st.integers(1, 9), elements=st.integers(0, 1000)).filter(np.any)


# load


@pytest.mark.parametrize("experts", [1, 2, 7, 16])
def test_an_even_load(experts):
    counts = np.full(experts, 12)
    assert rs.load_ratio(counts) == pytest.approx(np.ones(experts))
    expected = (1.0, experts, 0.0, 0.0, 0.0, 1 / experts)
    assert [float(f(counts)) for f in LOAD] == pytest.approx(expected, abs=1e-12)
    assert rs.dead(counts) == rs.starved(counts) == []


@pytest.mark.parametrize("experts", [2, 8])
def test_one_expert_takes_all(experts):
    counts = np.eye(experts, dtype=int)[1] * 40
    expected = (0.0, 1.0, 1 - 1 / experts, math.sqrt(experts - 1), experts - 1, 1.0)
    assert [float(f(counts)) for f in LOAD] == pytest.approx(expected, abs=1e-12)
    assert rs.dead(counts) == rs.starved(counts) == [e for e in range(experts) if e != 1]


def test_half_of_the_experts_share_the_load():
    counts = [5, 0, 5, 0, 5, 0, 5, 0]
    expected = (math.log(4) / math.log(8), 4.0, 0.5, 1.0, 1.0, 0.25)
    assert [float(f(counts)) for f in LOAD] == pytest.approx(expected)


@pytest.mark.parametrize("experts", [1, 4])
def test_without_counts_everything_is_zero_and_every_expert_dead(experts):
    nothing = np.zeros(experts)
    assert [float(f(nothing)) for f in LOAD] == [0.0] * len(LOAD)
    assert not rs.load_ratio(nothing).any()
    assert rs.dead(nothing) == rs.starved(nothing) == list(range(experts))


def test_starved_is_below_a_tenth_of_the_even_load():
    counts = [1000, 25, 24, 0, 1, 0]  # of 1050: even would be 175
    assert rs.load_ratio(counts)[1:3] == pytest.approx([25 / 175, 24 / 175])
    assert rs.starved(counts) == [3, 4, 5]
    assert rs.starved(counts, threshold=25 / 175) == [2, 3, 4, 5], "strictly below"
    assert rs.starved(counts, threshold=0.0) == []
    assert rs.dead(counts) == [3, 5]


@given(some_counts, st.integers(1, 50), st.randoms(use_true_random=False))
def test_load_knows_neither_scale_nor_order(counts, scale, random):
    order = random.sample(range(len(counts)), len(counts))
    for f in LOAD:
        assert f(counts[order] * scale) == pytest.approx(f(counts), abs=1e-9), f.__name__


@given(some_counts)
def test_load_against_its_definitions(counts):
    p, experts = counts / counts.sum(), len(counts)
    assert rs.gini(counts) == pytest.approx(np.abs(p[:, None] - p).sum() / (2 * experts), abs=1e-12)
    assert rs.coefficient_of_variation(counts) == pytest.approx(counts.std() / counts.mean(), abs=1e-12)
    assert rs.max_violation(counts) == pytest.approx(counts.max() / counts.mean() - 1, abs=1e-12)
    assert 1 - 1e-9 <= rs.effective_experts(counts) <= experts + 1e-9
    assert 0 <= rs.normalised_entropy(counts) <= 1
    assert rs.load_ratio(counts).sum() == pytest.approx(experts)


def test_leading_axes_stay():
    counts = np.random.default_rng(0).integers(0, 50, (3, 2, 5))
    counts[1, 1] = 0
    for f in (*LOAD, rs.load_ratio):
        whole = f(counts)
        assert whole.shape[:2] == (3, 2)
        assert np.array_equal(whole[2, 1], f(counts[2, 1])) and not np.any(whole[1, 1])


def test_what_is_no_count():
    for bad in ([1, -1], [1, math.nan], [math.inf, 1], 3, np.zeros((2, 0))):
        with pytest.raises(BadInputError, match="counts must be"):
            rs.load_ratio(bad)
    for f in (rs.dead, rs.starved):
        with pytest.raises(BadInputError, match="one block"):
            f(np.ones((2, 3)))


def test_means_of_sums():
    assert rs.mean_of([6.0, 1.0, 0.0], [3, 0, 2]).tolist() == [2.0, 0.0, 0.0]
    assert rs.mean_of(np.ones((2, 3)), [[2], [0]]).tolist() == [[0.5] * 3, [0.0] * 3]


# choices


@given(arrays(np.int64, (2, 6), elements=st.integers(0, 100)).filter(lambda a: a.any(axis=1).all()))
def test_jensen_shannon_is_scipys(pair):
    assert rs.jensen_shannon_distance(*pair) == pytest.approx(jensenshannon(*pair, base=2), abs=1e-7)


@given(arrays(np.int64, (3, 5), elements=st.integers(0, 100)).filter(lambda a: a.any(axis=1).all()))
def test_jensen_shannon_is_a_metric(three):
    p, q, r = three
    d = rs.jensen_shannon_distance
    assert d(p, q) == d(q, p)
    assert d(p, 3 * p) == pytest.approx(0, abs=1e-7)
    assert d(p, r) <= d(p, q) + d(q, r) + 1e-9


def test_jensen_shannon_closed_forms():
    d = rs.jensen_shannon_distance
    assert d([1, 1, 0, 0], [0, 0, 3, 3]) == 1.0
    # m = (3/4, 1/4): the divergence is (log2(4/3) + log2(2/3)/2 + log2(2)/2) / 2
    assert d([1, 0], [1, 1]) == pytest.approx(math.sqrt((math.log2(4 / 3) + math.log2(2 / 3) / 2 + 0.5) / 2))
    assert d([[1, 0], [0, 1], [0, 0]], [1, 0]).tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(BadInputError, match="2 and 3 experts"):
        d([1, 1], [1, 1, 1])


def test_neighbour_agreement():
    rows, columns = np.indices((4, 4))
    assert rs.neighbour_agreement(np.zeros((3, 4, 4), int)) == 1.0
    assert rs.neighbour_agreement((rows + columns) % 2) == 0.0
    assert rs.neighbour_agreement(columns) == 0.5, "only those one above the other agree"
    assert rs.neighbour_agreement([[1, 1], [1, 2]]) == 0.5
    assert rs.neighbour_agreement(np.zeros((2, 1, 1), int)) == 0.0, "no pairs"
    with pytest.raises(BadInputError):
        rs.neighbour_agreement([1, 2])


def test_neighbours_that_choose_on_their_own_agree_by_chance():
    p = [0.5, 0.3, 0.2]
    maps = np.random.default_rng(0).choice(3, size=(400, 16, 16), p=p)
    assert rs.neighbour_agreement(maps) == pytest.approx(0.38, abs=0.005)
    assert rs.chance_agreement(np.bincount(maps.ravel())) == pytest.approx(0.38, abs=0.005)


def test_overlap_of_sets():
    a = np.array([[0, 1], [2, 3], [4, 5]])
    assert rs.routing_overlap(a, a[:, ::-1]) == 1.0
    assert rs.routing_overlap(a, [[1, 9], [3, 2], [6, 7]]) == 0.5
    assert rs.routing_overlap(a, a + 10) == 0.0
    assert rs.routing_overlap([[3, 3]], [[3, 3]]) == 1.0
    assert rs.routing_overlap([[3, 3]], [[3, 4]]) == rs.routing_overlap([[3, 4]], [[3, 3]]) == 0.5
    assert rs.routing_overlap([[1, 2, 3]], [[3]]) == pytest.approx(1 / 3), "different k"
    assert rs.routing_overlap(np.zeros((0, 2), int), np.zeros((0, 2), int)) == 0.0
    for b in ([[1, 2]], [1, 2, 3], np.zeros((3, 0), int)):
        with pytest.raises(BadInputError, match="same tokens"):
            rs.routing_overlap(a, b)


@given(
    arrays(np.int64, (4, 3), elements=st.integers(0, 5)),
    arrays(np.int64, (4, 3), elements=st.integers(0, 5)),
    st.permutations(range(3)),
)
def test_overlap_knows_no_slots_and_no_sides(a, b, order):
    expected = np.mean([len({*x} & {*y}) / max(len({*x}), len({*y})) for x, y in zip(a, b, strict=True)])
    assert rs.routing_overlap(a, b) == pytest.approx(expected)
    assert rs.routing_overlap(a[:, order], b) == rs.routing_overlap(b, a) == rs.routing_overlap(a, b)


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (16, 2), (6, 3), (4, 4), (1, 1)])
def test_random_choices_overlap_by_chance(experts, k):
    scores = np.random.default_rng(1).random((2, 20_000, experts))
    a, b = np.argsort(scores, axis=2)[:, :, :k]
    assert rs.routing_overlap(a, b) == pytest.approx(rs.chance_overlap(experts, k), abs=0.01)


def test_no_chance_to_choose_more_than_there_are():
    for experts, k in ((4, 5), (4, 0)):
        with pytest.raises(BadInputError):
            rs.chance_overlap(experts, k)


# relations


def test_lift_of_independent_and_of_tied_experts():
    # 100 tokens; 0 and 1 independent halves, 2 goes always with 0, 3 is never chosen
    together = np.array([[50, 25, 50, 0], [25, 50, 25, 0], [50, 25, 50, 0], [0, 0, 0, 0]])
    lift = rs.coactivation_lift(together, 100)
    assert lift[0, 1] == lift[1, 2] == 1.0
    assert lift[0, 2] == 2.0 and lift[0, 0] == 2.0
    assert not lift[3].any() and not lift[:, 3].any()


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (6, 3), (4, 4)])
def test_lift_of_random_pairs(experts, k):
    chosen = np.argsort(np.random.default_rng(2).random((50_000, experts)), axis=1)[:, :k]
    hot = np.eye(experts)[chosen].sum(axis=1)
    lift = rs.coactivation_lift(np.stack([hot.T @ hot] * 2), [len(hot)] * 2)
    pairs = ~np.eye(experts, dtype=bool)
    assert lift.shape == (2, experts, experts)
    assert lift[1][pairs] == pytest.approx(experts * (k - 1) / (k * (experts - 1)), abs=0.03)
    assert lift[1][~pairs] == pytest.approx(experts / k, abs=0.1)


def test_transitions():
    got = rs.transition_probabilities([[1, 3, 0], [0, 0, 0], [2, 2, 4]])
    assert got.tolist() == [[0.25, 0.75, 0.0], [0.0, 0.0, 0.0], [0.25, 0.25, 0.5]]
    assert rs.transition_probabilities(np.ones((5, 4, 2))).tolist() == np.full((5, 4, 2), 0.5).tolist()
    with pytest.raises(BadInputError):
        rs.transition_probabilities([1, 2])


def test_output_cosine():
    outputs = np.array([[1.0, 0, 0], [1.0, 1.0, 0], [-2.0, 0, 0], [0, 0, 0]])
    root = math.sqrt(0.5)
    expected = [[1, root, -1, 0], [root, 1, -root, 0], [-1, -root, 1, 0], [0, 0, 0, 0]]
    assert rs.output_cosine(outputs @ outputs.T) == pytest.approx(np.array(expected))
    scale = np.array([1e-120, 1e150, 1.0, 1.0])
    assert rs.output_cosine((outputs @ outputs.T) * np.outer(scale, scale)) == pytest.approx(np.array(expected))
    with pytest.raises(BadInputError, match=r"\(\.\.\., E, E\)"):
        rs.output_cosine(outputs)


def random_outputs(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("tokens", [200, 12])
def test_cka_knows_neither_rotation_nor_scale_nor_mean(tokens):
    x, y = random_outputs(0, tokens, 20), random_outputs(1, tokens, 30)
    y[:, :20] += x
    rotation = np.linalg.qr(random_outputs(2, 20, 20))[0]
    cka = rs.linear_cka(x, y)
    assert 0 < cka < 1
    assert rs.linear_cka(x @ rotation * 3 + 5, y) == pytest.approx(cka, rel=1e-9)
    assert rs.linear_cka(y, x) == pytest.approx(cka, rel=1e-12)
    assert rs.linear_cka(x, x @ rotation - 7) == pytest.approx(1.0)
    assert rs.cka_from_grams(x @ x.T, y @ y.T) == pytest.approx(cka, rel=1e-9), "both ways to the same number"
    # by definition, with the centring matrix written out
    centre = np.eye(tokens) - 1 / tokens
    k, other = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    assert cka == pytest.approx((k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum()), rel=1e-9)


def test_cka_of_unrelated_and_of_constant_outputs():
    x = random_outputs(0, 5000, 3)
    assert rs.linear_cka(x, random_outputs(1, 5000, 3)) < 0.01
    constant = np.full((5000, 2), 0.1)
    assert rs.linear_cka(x, constant) == rs.linear_cka(constant, x) == rs.linear_cka(x, 0 * x) == 0.0
    assert rs.cka_from_grams(np.full((4, 4), 0.3), np.eye(4)) == 0.0
    for other in (x[:-1], x[0], np.full_like(x, math.nan)):
        with pytest.raises(BadInputError):
            rs.linear_cka(x, other)
    with pytest.raises(BadInputError):
        rs.cka_from_grams(np.eye(3), np.eye(4))


def random_expert(seed, hidden=12, width=5):
    return (
        random_outputs([seed, 0], hidden, width),
        random_outputs([seed, 1], hidden, width),
        random_outputs([seed, 2], width, hidden),
    )


def reordered(expert, order):
    gate, up, down = expert
    return gate[order], up[order], down[:, order]


@given(st.permutations(range(12)), st.integers(0, 100))
def test_matched_weights_know_no_order_of_neurons(order, seed):
    a, b = random_expert(seed), random_expert(seed + 1)
    assert rs.matched_weight_cosine(a, reordered(a, order)) == pytest.approx(1.0)
    assert rs.matched_weight_cosine(a, reordered(b, order)) == pytest.approx(rs.matched_weight_cosine(a, b))
    assert rs.matched_weight_cosine(b, a) == pytest.approx(rs.matched_weight_cosine(a, b))


def test_matched_weights_of_another_width_and_of_none():
    a = random_expert(0)
    part = reordered(a, [3, 1, 8])
    rows = np.concatenate((a[0], a[1], a[2].T), axis=1)
    # the norm of the part over that of the whole
    expected = np.linalg.norm(rows[[3, 1, 8]]) / np.linalg.norm(rows)
    assert rs.matched_weight_cosine(a, part) == pytest.approx(expected)
    assert rs.matched_weight_cosine(part, a) == pytest.approx(expected)
    assert rs.matched_weight_cosine(a, tuple(0 * w for w in a)) == 0.0
    assert rs.matched_weight_cosine(a, tuple(3 * w for w in a)) == pytest.approx(1.0), "scale is none of its business"


def test_matching_finds_the_best_of_all_orders():
    from itertools import permutations

    a, b = random_expert(5, hidden=4), random_expert(6, hidden=4)
    flat = [np.concatenate((g.ravel(), u.ravel(), d.T.ravel())) for g, u, d in (a, b)]
    norms = np.linalg.norm(flat[0]) * np.linalg.norm(flat[1])
    best = max(
        sum((x * y).sum() for x, y in zip(a, reordered(b, list(order)), strict=True))
        for order in permutations(range(4))
    )
    assert rs.matched_weight_cosine(a, b) == pytest.approx(best / norms)


def test_weights_that_do_not_fit():
    a = random_expert(0)
    with pytest.raises(BadInputError, match="width 5 and 6"):
        rs.matched_weight_cosine(a, random_expert(0, width=6))
    with pytest.raises(BadInputError, match=r"down \(D, H\)"):
        rs.matched_weight_cosine(a, (a[0], a[1], a[2].T))
    with pytest.raises(BadInputError, match="finite"):
        rs.matched_weight_cosine(a, (a[0] * math.nan, a[1], a[2]))
