"""Distances at infinitely many images: lines, and Gaussians whose distance is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.scores.extrapolation import extrapolate, frechet_infinity, sizes_for
from ditmoe_cli.evaluation.scores.feature_statistics import FeatureStatistics, feature_statistics
from ditmoe_cli.evaluation.scores.frechet import frechet_distance


@given(st.floats(-100, 100), st.floats(-1e4, 1e4))
def test_a_line_is_found_again(intercept, slope):
    sizes = [100, 150, 400, 1000]
    got = extrapolate(sizes, [intercept + slope / n for n in sizes])
    assert got.intercept == pytest.approx(intercept, abs=1e-9)
    assert got.slope == pytest.approx(slope, abs=1e-6)
    assert got.standard_error == pytest.approx(0, abs=1e-9)
    assert got.sizes == tuple(sizes)


def test_fit_and_standard_error_are_those_of_least_squares():
    generator = np.random.default_rng(0)
    sizes = list(range(100, 1600, 100))
    values = 3 + 500 / np.array(sizes) + 0.1 * generator.normal(size=15)
    got = extrapolate(sizes, values)
    design = np.stack([np.ones(15), 1 / np.array(sizes)], axis=1)
    solution, residual, *_ = np.linalg.lstsq(design, values, rcond=None)
    covariance = np.linalg.inv(design.T @ design) * residual[0] / 13
    assert (got.intercept, got.slope) == pytest.approx(tuple(solution), rel=1e-9)
    assert got.standard_error == pytest.approx(np.sqrt(covariance[0, 0]), rel=1e-9)


def test_standard_error_is_the_spread_of_intercepts():
    generator = np.random.default_rng(0)
    sizes = np.arange(100, 1600, 100)
    fits = [extrapolate(sizes, 3 + 500 / sizes + 0.1 * generator.normal(size=15)) for _ in range(400)]
    spread = np.std([fit.intercept for fit in fits])
    assert np.sqrt(np.mean([fit.standard_error**2 for fit in fits])) == pytest.approx(spread, rel=0.1)


def test_gaussians_of_a_known_distance():
    """FID at 3,000 images is biased upwards by more than half; the line removes nearly all of it."""
    generator = np.random.default_rng(0)
    dimension = 40
    reference = FeatureStatistics(np.zeros(dimension), np.eye(dimension), None)
    truth = dimension * (1.1 - 1) ** 2 + 0.04
    shift = np.zeros(dimension)
    shift[0] = 0.2
    plain, fits = [], []
    for _ in range(6):
        features = shift + 1.1 * generator.normal(size=(3000, dimension))
        plain.append(frechet_distance(feature_statistics(features), reference))
        fits.append(frechet_infinity(features, reference))
    bias = np.mean(plain) - truth
    assert bias > 0.2 * truth
    assert abs(np.mean([fit.intercept for fit in fits]) - truth) < 0.2 * bias
    # The last of the sizes is that of all images, whatever their order.
    assert [fit.values[-1] for fit in fits] == pytest.approx(plain, rel=1e-9)
    # b of FID_N = FID_∞ + b / N.
    assert np.mean([fit.slope for fit in fits]) == pytest.approx(bias * 3000, rel=0.2)


def test_values_are_those_of_the_first_images():
    features = np.random.default_rng(0).normal(size=(60, 3))
    reference = FeatureStatistics(np.ones(3), np.diag([1.0, 2.0, 3.0]), None)
    got = frechet_infinity(features, reference, points=4, seed=None)
    assert got.sizes == (6, 24, 42, 60)
    expected = [frechet_distance(feature_statistics(features[:n]), reference) for n in got.sizes]
    assert got.values == pytest.approx(expected, rel=1e-9)
    shuffled = frechet_infinity(features, reference, points=4, seed=1)
    assert shuffled == frechet_infinity(features, reference, points=4, seed=1)
    assert shuffled.values[0] != pytest.approx(got.values[0])


@given(st.integers(1, 60), st.integers(0, 500), st.integers(3, 20))
def test_sizes_grow_to_all_images_and_leave_covariances_regular(dimension, more, points):
    images = 2 * (dimension + 1) + points + more
    sizes = sizes_for(images, dimension, points)
    assert len(set(sizes)) == points
    assert sizes == tuple(sorted(sizes))
    assert sizes[0] >= max(images / 10, dimension + 1)
    assert sizes[-1] == images


def test_sizes_of_the_paper():
    assert sizes_for(50_000, 2048)[0] == 5000
    assert len(sizes_for(50_000, 2048)) == 15


def test_too_few_images_are_refused():
    with pytest.raises(BadInputError, match="over 2048 features needs at least 4098 images, got 2048"):
        sizes_for(2048, 2048)
    with pytest.raises(BadInputError, match="over 2 features needs at least 17 images, got 9"):
        frechet_infinity(np.ones((9, 2)), FeatureStatistics(np.zeros(2), np.eye(2), None))
    assert len(sizes_for(17, 2)) == 15
    with pytest.raises(BadInputError, match=r"features must be \(images, width\)"):
        frechet_infinity(np.ones(9), FeatureStatistics(np.zeros(2), np.eye(2), None))
    with pytest.raises(UsageError, match="at least 3 sizes"):
        sizes_for(100, 2, 2)
    for sizes in ([1, 2], [5, 5, 5], [0, 1, 2]):
        with pytest.raises(UsageError, match="3 values at differing sizes"):
            extrapolate(sizes, [1.0] * len(sizes))
    with pytest.raises(UsageError):
        extrapolate([1, 2, 3], [1.0, 2.0])
