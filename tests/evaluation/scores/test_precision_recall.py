"""Precision and recall: closed forms, one distance at a time, and blocks of every size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.scores.precision_recall import PrecisionRecall, precision_recall


def by_loops(subject, reference, k):
    """From the definition, with the difference of each pair."""

    def distance(x, y):
        return float(((x - y) ** 2).sum())

    def radii(features):
        return [sorted(distance(x, y) for j, y in enumerate(features) if j != i)[k - 1] for i, x in enumerate(features)]

    def covered(points, centres):
        balls = list(zip(centres, radii(centres), strict=True))
        return np.mean([any(distance(p, c) <= r for c, r in balls) for p in points])

    return covered(subject, reference), covered(reference, subject)


@given(st.integers(0, 10_000), st.integers(5, 20), st.integers(5, 20), st.integers(1, 4), st.integers(1, 25))
def test_it_follows_the_definition_whatever_the_blocks(seed, n, m, k, block):
    generator = np.random.default_rng(seed)
    subject, reference = generator.normal(size=(n, 3)), 0.5 + generator.normal(size=(m, 3))
    got = precision_recall(subject, reference, k, block=block)
    assert (got.precision, got.recall) == by_loops(subject, reference, k)
    assert got.neighbours == k


def test_on_a_line_by_hand():
    # Radii of the reference (k = 1): 1, 1, 8. Of 0.5, 2.5, 3, 30 the first three lie within [-1, 2] or [2, 18].
    reference, subject = np.array([[0.0], [1.0], [10.0]]), np.array([[0.5], [2.5], [3.0], [30.0]])
    got = precision_recall(subject, reference, 1)
    # Balls of the subject: 0.5 ± 2, 2.5 ± 0.5, 3 ± 0.5 and 30 ± 27: all of the reference.
    assert (got.precision, got.recall) == (1 / 4 + 2 / 4, 1.0)


def test_equal_sets_cover_each_other_and_far_ones_do_not():
    a = np.random.default_rng(0).normal(size=(30, 5))
    assert precision_recall(a, a[::-1].copy()) == PrecisionRecall(1.0, 1.0, 3)
    assert precision_recall(a, a + 100) == PrecisionRecall(0.0, 0.0, 3)


def test_a_set_that_is_too_narrow_has_precision_and_no_recall():
    generator = np.random.default_rng(0)
    wide, narrow = generator.normal(size=(200, 4)), 0.05 * generator.normal(size=(200, 4))
    got = precision_recall(narrow, wide)
    assert got.precision == 1.0
    assert got.recall < 0.1
    swapped = precision_recall(wide, narrow)
    assert (swapped.precision, swapped.recall) == (got.recall, got.precision)


def test_copies_far_from_the_origin_lie_on_the_surface_of_their_ball():
    """A radius of zero: |x|² + |y|² - 2 x·y must not leave rounding where images are equal."""
    points, others = 1e3 + np.random.default_rng(0).normal(size=(2, 5, 700))
    copies, mixed = np.repeat(points, 6, axis=0), np.concatenate([points, others])
    for (subject, reference), shares in (((copies, mixed), (1.0, 0.5)), ((mixed, copies), (0.5, 1.0))):
        got = precision_recall(subject, reference)
        assert (got.precision, got.recall) == shares


def test_moving_turning_and_scaling_both_changes_nothing():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(40, 6)), 0.4 + generator.normal(size=(50, 6))
    turn, _ = np.linalg.qr(generator.normal(size=(6, 6)))
    before = precision_recall(a, b)
    assert precision_recall(*(3 * side @ turn + 1000 for side in (a, b))) == before
    assert 0 < before.recall < 1


def test_what_is_refused():
    a = np.eye(5)
    for bad in (a[:3], a[0], a[:, :0], np.full((5, 5), np.inf)):
        with pytest.raises(BadInputError, match="of more images than that"):
            precision_recall(bad, a)
    with pytest.raises(BadInputError, match="width 5 and 4"):
        precision_recall(a, a[:, :4])
    with pytest.raises(UsageError, match="at least 1 neighbour and block"):
        precision_recall(a, a, 0)
