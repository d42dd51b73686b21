"""The kernel distance: by loops, without bias by enumeration, and its draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.scores.conventions import KernelSubsets
from ditmoe_cli.evaluation.scores.kernel_distance import kernel_distance, squared_mmd


def kernel(x, y, degree=3, coefficient=1.0):
    return (float(np.dot(x, y)) / len(x) + coefficient) ** degree


def by_loops(a, b, **options):
    n, m = len(a), len(b)
    within_a = sum(kernel(a[i], a[j], **options) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(kernel(b[i], b[j], **options) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_a + within_b - 2 * np.mean([kernel(x, y, **options) for x in a for y in b])


@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(2, 7), st.integers(1, 5))
def test_squared_mmd_by_loops(seed, n, m, width):
    generator = np.random.default_rng(seed)
    a, b = generator.normal(size=(n, width)), 1 + generator.normal(size=(m, width))
    scale = max(np.abs(a).max(), np.abs(b).max(), 1) ** 6
    assert squared_mmd(a, b) == pytest.approx(by_loops(a, b), abs=1e-9 * scale)
    options = {"degree": 2, "coefficient": 0.5}
    assert squared_mmd(a, b, **options) == pytest.approx(by_loops(a, b, **options), abs=1e-9 * scale)


def test_it_has_no_bias():
    """Over all equally likely samples of three points each, the mean is the population's squared MMD."""
    p, q = np.array([[0.0], [1.0]]), np.array([[0.0], [2.0]])
    population = (
        np.mean([kernel(x, y) for x in p for y in p])
        + np.mean([kernel(x, y) for x in q for y in q])
        - 2 * np.mean([kernel(x, y) for x in p for y in q])
    )
    values = [
        squared_mmd(np.array(a), np.array(b))
        for a in itertools.product(p, repeat=3)
        for b in itertools.product(q, repeat=3)
    ]
    assert np.mean(values) == pytest.approx(population, rel=1e-12)
    assert population > 1
    assert min(values) < 0


def test_one_distribution_is_near_zero_whatever_the_number_and_two_are_not():
    generator = np.random.default_rng(0)
    a, b, far = (shift + generator.normal(size=(400, 6)) for shift in (0, 0, 0.5))
    near = kernel_distance(a, b, KernelSubsets(50, 100))
    assert abs(near.mean) < near.deviation
    assert kernel_distance(a, far, KernelSubsets(50, 100)).mean > 5 * abs(near.mean)
    # Subsets are but noise about the whole.
    whole = squared_mmd(a, far)
    for size in (50, 200):
        got = kernel_distance(a, far, KernelSubsets(200, size))
        assert got.mean == pytest.approx(whole, abs=4 * got.deviation / np.sqrt(200))


def test_subsets_are_drawn_for_the_scored_side_first():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(9, 3)), generator.normal(size=(12, 3))
    draws = np.random.RandomState(7)
    expected = []
    for _ in range(4):
        rows_a = draws.choice(9, 5, replace=False)
        rows_b = draws.choice(12, 5, replace=False)
        expected.append(by_loops(a[rows_a], b[rows_b]))
    got = kernel_distance(a, b, KernelSubsets(4, 5, seed=7))
    assert got.values == pytest.approx(expected, rel=1e-10)
    assert (got.mean, got.deviation) == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-10)
    assert got.size == 5


def test_whole_sets_make_every_subset_the_same():
    a, b = np.random.default_rng(0).normal(size=(2, 8, 3))
    got = kernel_distance(a, b, KernelSubsets(3, shrink=True))
    assert got.size == 8
    assert got.values == pytest.approx([squared_mmd(a, b)] * 3, rel=1e-9)


def test_what_is_refused():
    a = np.eye(5)
    with pytest.raises(BadInputError, match="over subsets of 6 images needs as many, got 5 and 5"):
        kernel_distance(a, a, KernelSubsets(size=6))
    with pytest.raises(BadInputError, match="width 5 and 4"):
        squared_mmd(a, a[:, :4])
    for bad in (a[:1], a[0], a[:, :0]):
        with pytest.raises(BadInputError, match="at least 2 images"):
            squared_mmd(bad, a)
    for options in ({"subsets": 0}, {"size": 1}):
        with pytest.raises(UsageError, match="at least 1 subset of at least 2 images"):
            kernel_distance(a, a, KernelSubsets(**options))
