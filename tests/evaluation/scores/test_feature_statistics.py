"""Statistics of features agree with numpy, merge, and refuse other arrays."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.scores.feature_statistics import FeatureSums, feature_statistics, feature_sums


def features(n, width, seed=0, offset=0.0):
    return offset + np.random.default_rng(seed).normal(size=(n, width))


def test_mean_and_covariance_are_numpys():
    x = features(50, 6)
    got = feature_statistics(x)
    assert np.allclose(got.mu, x.mean(0), rtol=1e-13, atol=1e-15)
    assert np.allclose(got.sigma, np.cov(x, rowvar=False), rtol=1e-12, atol=1e-15)
    assert (got.n, got.dimension) == (50, 6)


def test_two_images_by_hand():
    got = feature_statistics(np.array([[0.0, 1.0], [2.0, 5.0]]))
    assert got.mu.tolist() == [1.0, 3.0]
    assert got.sigma.tolist() == [[2.0, 4.0], [4.0, 8.0]]


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    width=st.integers(1, 5),
    offset=st.sampled_from([0.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
    order=st.randoms(use_true_random=False),
)
def test_merged_sums_equal_one_pass_in_any_order(sizes, width, offset, seed, order):
    x = features(sum(sizes), width, seed, offset)
    shards = np.split(x, np.cumsum(sizes)[:-1])
    order.shuffle(shards)
    merged = reduce(FeatureSums.merge, map(feature_sums, shards)).statistics()
    whole = feature_statistics(x)
    assert merged.n == whole.n
    assert np.allclose(merged.mu, whole.mu, rtol=1e-12, atol=1e-12)
    assert np.allclose(merged.sigma, whole.sigma, rtol=1e-7, atol=1e-9)


def test_features_far_from_zero_keep_their_covariance():
    x = features(200, 4)
    far = feature_statistics(x + 1e8)
    # 1e8 leaves x itself only about eight digits.
    assert np.allclose(far.sigma, np.cov(x, rowvar=False), rtol=1e-5, atol=1e-6)


def test_single_precision_features_are_summed_in_double():
    x = features(3000, 3).astype(np.float32)
    assert feature_statistics(x).mu.dtype == np.float64
    assert np.allclose(feature_statistics(x).mu, x.astype(np.float64).mean(0), rtol=1e-12)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((1, 3)), "at least 2 images, got 1"),
        (np.ones(3), r"must be \(images, width\) .* got \(3,\)"),
        (np.ones((0, 3)), r"at least one image, got \(0, 3\)"),
        (np.array([[0.0], [np.nan]]), "NaN or infinite"),
        (np.array([[0.0], [np.inf]]), "NaN or infinite"),
    ],
)
def test_what_is_refused(x, message):
    with pytest.raises(BadInputError, match=message):
        feature_statistics(x)
