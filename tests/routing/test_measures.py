"""Statistics of routing counts: closed forms, invariances, and what happens without any counts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import jensenshannon

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.routing import measures as rs

LOAD = (
    rs.normalised_entropy,
    rs.effective_experts,
    rs.gini,
    rs.coefficient_of_variation,
    rs.max_violation,
)
some_counts = arrays(np.int64, st.integers(1, 9), elements=st.integers(0, 1000)).filter(np.any)


# load


@pytest.mark.parametrize("experts", [1, 2, 7, 16])
def test_an_even_load(experts):
    counts = np.full(experts, 12)
    assert rs.load_ratio(counts) == pytest.approx(np.ones(experts))
    expected = (1.0, experts, 0.0, 0.0, 0.0)
    assert [float(f(counts)) for f in LOAD] == pytest.approx(expected, abs=1e-12)
    assert rs.dead(counts) == rs.starved(counts) == []


@pytest.mark.parametrize("experts", [2, 8])
def test_one_expert_takes_all(experts):
    counts = np.eye(experts, dtype=int)[1] * 40
    expected = (0.0, 1.0, 1 - 1 / experts, math.sqrt(experts - 1), experts - 1)
    assert [float(f(counts)) for f in LOAD] == pytest.approx(expected, abs=1e-12)
    assert rs.dead(counts) == rs.starved(counts) == [e for e in range(experts) if e != 1]


def test_half_of_the_experts_share_the_load():
    counts = [5, 0, 5, 0, 5, 0, 5, 0]
    expected = (math.log(4) / math.log(8), 4.0, 0.5, 1.0, 1.0)
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


def test_agreement_of_pairs():
    # two tokens of k = 2: {0, 1} before and after, {0, 2} before and {2, 3} after
    before = np.array([[1, 1, 0, 0], [1, 0, 1, 0]])
    after = np.array([[1, 1, 0, 0], [0, 0, 1, 1]])
    found = rs.agreement(before.T @ after, 2)
    assert float(found.kept) == pytest.approx((1 + 0.5) / 2)
    p, q = before.sum(0) / 4, after.sum(0) / 4
    assert float(found.chance) == pytest.approx(2 * (p * q).sum())
    nothing = rs.agreement(np.zeros((3, 4, 4)), np.zeros(3))
    assert not nothing.kept.any() and not nothing.chance.any()
    for pairs in ([[1, 2]], [[math.nan]]):
        with pytest.raises(BadInputError, match="pairs of experts"):
            rs.agreement(pairs, 1)


@given(st.integers(0, 100), st.integers(1, 4))
def test_choices_of_ones_own_agree_by_chance(seed, k):
    generator = np.random.default_rng(seed)
    favour = generator.random(6)
    a, b = np.argsort(generator.random((2, 4000, 6)) ** (1 / favour), axis=2)[:, :, -k:]
    hot_a, hot_b = (np.eye(6)[c].sum(axis=1) for c in (a, b))
    found = rs.agreement(hot_a.T @ hot_b, k)
    direct = np.mean([len({*x} & {*y}) / k for x, y in zip(a.tolist(), b.tolist(), strict=True)])
    assert float(found.kept) == pytest.approx(direct)
    assert float(found.chance) == pytest.approx(direct, abs=0.04)


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
    assert lift[1][pairs] == pytest.approx(rs.random_pair_lift(experts, k), abs=0.03)
    assert lift[1][~pairs] == pytest.approx(experts / k, abs=0.1)


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


def hsic_by_definition(k, other):
    """The U-statistic over all quadruples of different tokens (Gretton et al. 2007), summed one by one."""
    n = len(k)
    quadruples = itertools.permutations(range(n), 4)
    terms = [k[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q]) for i, j, q, r in quadruples]
    return np.mean(terms)


def grams(*outputs):
    return np.stack([x @ x.T for x in outputs])


def test_hsic_is_its_u_statistic():
    k = grams(random_outputs(0, 7, 3), random_outputs(1, 7, 2))
    found = rs.unbiased_hsic(k)
    for i, j in itertools.product(range(2), repeat=2):
        assert found[i, j] == pytest.approx(hsic_by_definition(k[i], k[j]))
    assert not rs.unbiased_hsic(np.ones((2, 3, 3))).any(), "too few tokens"
    with pytest.raises(BadInputError, match="Gram"):
        rs.unbiased_hsic(np.eye(3))


def test_alignment_knows_neither_rotation_nor_scale_nor_mean():
    x, y = random_outputs(0, 300, 20), random_outputs(1, 300, 30)
    y[:, :20] += x
    rotation = np.linalg.qr(random_outputs(2, 20, 20))[0]
    found = rs.alignment(rs.unbiased_hsic(grams(x, x @ rotation * 3 + 5, y, 0 * x)))
    assert found[0, 1] == pytest.approx(1.0)
    assert 0 < found[0, 2] < 1 and found[0, 2] == pytest.approx(found[1, 2])
    assert not found[3].any(), "what does not vary is like nothing"


def test_unrelated_outputs_of_many_dimensions_are_not_alike():
    """The plain estimator of CKA is near 1 for fewer tokens than dimensions; batches of the unbiased one are not."""
    batches = [rs.unbiased_hsic(grams(*random_outputs(seed, 2, 40, 200))) for seed in range(30)]
    assert abs(rs.alignment(np.mean(batches, axis=0))[0, 1]) < 0.05


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
