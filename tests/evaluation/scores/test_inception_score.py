"""The Inception score: closed forms, invariants, and ADM's own computation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.scores.inception_score import inception_score


def test_equal_predictions_score_one():
    assert inception_score(np.zeros((10, 7)), parts=2).mean == pytest.approx(1, rel=1e-14)
    assert inception_score(np.tile(np.arange(7.0), (10, 1)), chunk=4).parts == pytest.approx((1, 1, 1), rel=1e-14)


@pytest.mark.parametrize("height", [50.0, 1e4])
def test_sure_predictions_of_all_classes_score_their_number(height):
    # At 10,000 the other classes underflow to zero altogether.
    logits = height * np.eye(8)
    assert inception_score(logits, parts=1).mean == pytest.approx(8, rel=1e-12)
    # One class alone: certain, without variety.
    assert inception_score(np.tile(logits[:1], (8, 1)), parts=1).mean == pytest.approx(1, rel=1e-12)
    # Half of the classes in each half of the images.
    halves = inception_score(logits, parts=2)
    assert (halves.mean, halves.deviation) == pytest.approx((4, 0), abs=1e-12)


def test_two_predictions_by_hand():
    # p = (¾, ¼) and (¼, ¾), so the mean is (½, ½): exp(¾ ln 1.5 + ¼ ln 0.5).
    logits = np.log([[3.0, 1.0], [1.0, 3.0]])
    assert inception_score(logits, parts=1).mean == pytest.approx(1.5**0.75 * 0.5**0.25, rel=1e-12)


def as_adm_does(logits, chunk):
    """The mean over consecutive chunks of exp of the mean of Σ p (log p - log mean p), from probabilities."""
    exponentials = np.exp(logits)
    p = exponentials / exponentials.sum(axis=1, keepdims=True)
    scores = []
    for start in range(0, len(p), chunk):
        part = p[start : start + chunk]
        divergences = [sum(q * (np.log(q) - np.log(m)) for q, m in zip(row, part.mean(axis=0))) for row in part]  # noqa: B905
        scores.append(np.exp(np.mean(divergences)))
    return scores


@pytest.mark.parametrize("chunk", [5, 7, 23, 100])
def test_chunks_are_those_of_adm(chunk):
    logits = np.random.default_rng(0).normal(size=(23, 6))
    expected = as_adm_does(logits, chunk)
    got = inception_score(logits, chunk=chunk)
    assert got.parts == pytest.approx(expected, rel=1e-12)
    assert (got.mean, got.deviation) == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-9)
    # They are not shuffled: sorted by class the score falls.
    varied = 50 * np.eye(10).repeat(10, axis=0)
    assert inception_score(varied, chunk=10).mean == pytest.approx(1, rel=1e-9)
    assert inception_score(varied, chunk=100).mean == pytest.approx(10, rel=1e-9)
    assert inception_score(varied, parts=10, seed=0).mean > 3


@given(st.integers(0, 1000), st.floats(-50, 50))
def test_shifting_rows_and_relabelling_classes_change_nothing(seed, shift):
    generator = np.random.default_rng(seed)
    logits = 3 * generator.normal(size=(12, 5))
    moved = (logits + shift * generator.normal(size=(12, 1)))[:, generator.permutation(5)]
    before, after = inception_score(logits, parts=3, seed=1), inception_score(moved, parts=3, seed=1)
    assert before.parts == pytest.approx(after.parts, rel=1e-9)
    assert 1 <= before.mean <= 5


def test_parts_share_out_all_images():
    # 10 images in 4 parts: 2, 3, 2 and 3 of them, each with classes of its own.
    logits = 100 * np.eye(10)
    assert inception_score(logits, parts=4).parts == pytest.approx((2, 3, 2, 3), rel=1e-9)


@pytest.mark.parametrize(
    "options", [{}, {"parts": 2, "chunk": 2}, {"parts": 0}, {"chunk": 0}, {"parts": -1}, {"chunk": -5}]
)
def test_options_that_are_refused(options):
    with pytest.raises(UsageError, match="either parts or a chunk"):
        inception_score(np.eye(4), **options)


@pytest.mark.parametrize("logits", [np.zeros(3), np.zeros((0, 3)), np.full((3, 2), np.nan), np.zeros((2, 2, 2))])
def test_logits_that_are_refused(logits):
    with pytest.raises(BadInputError, match=r"finite and \(images, classes\)"):
        inception_score(logits, parts=1)


def test_too_few_images_are_refused():
    with pytest.raises(BadInputError, match="over 10 parts needs as many images, got 9"):
        inception_score(np.zeros((9, 2)), parts=10)
