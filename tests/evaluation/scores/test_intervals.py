"""Bootstrap intervals: their definitions, how often they hold the truth, and weighted Fréchet distances."""

from __future__ import annotations

import numpy as np
import pytest
from cases import with_slow
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.scores.feature_statistics import FeatureStatistics, feature_statistics
from ditmoe_cli.evaluation.scores.frechet import frechet_distance, frechet_of_features
from ditmoe_cli.evaluation.scores.intervals import (
    METHODS,
    Resampling,
    bootstrap,
    bootstrap_frechet,
    interval_of,
    weighted_statistics,
)


def test_intervals_by_hand():
    resampled = np.arange(1.0, 102.0)  # of mean 51; quantiles at 5 and 95 % are 6 and 96
    bounds = {method: interval_of(40.0, resampled, 0.9, method) for method in METHODS}
    assert (bounds["percentile"].low, bounds["percentile"].high) == pytest.approx((6, 96))
    assert (bounds["centred"].low, bounds["centred"].high) == pytest.approx((-5, 85))
    assert (bounds["basic"].low, bounds["basic"].high) == pytest.approx((-16, 74))
    for interval in bounds.values():
        assert (interval.bias, interval.resamples) == (pytest.approx(11), 101)
        assert interval.deviation == pytest.approx(resampled.std(ddof=1))


@pytest.mark.parametrize("method", with_slow(METHODS))
def test_intervals_of_a_mean_hold_the_truth_as_often_as_they_say(method):
    generator = np.random.default_rng(0)
    draws = generator.exponential(size=(300, 60))
    hits = 0
    for index, draw in enumerate(draws):
        got = bootstrap(np.mean, [draw], resampling=Resampling(100, method, 0.9, seed=index))
        hits += got.low <= 1 <= got.high
    # 300 trials of 0.9 have a deviation of 0.017; small skewed samples lose a few hundredths.
    assert 0.83 <= hits / 300 <= 0.95


def test_standard_error_is_that_of_the_mean():
    x = np.random.default_rng(0).normal(size=400)
    got = bootstrap(np.mean, [x], resampling=Resampling(2000))
    assert got.estimate == x.mean()
    assert got.deviation == pytest.approx(x.std() / 20, rel=0.05)
    assert abs(got.bias) < 0.1 * got.deviation


def test_pairing_cancels_what_both_sides_share():
    generator = np.random.default_rng(0)
    shared = 10 * generator.normal(size=200)
    a, b = shared + generator.normal(size=200), 0.5 + shared + generator.normal(size=200)

    def gap(x, y):
        return float(y.mean() - x.mean())

    paired, apart = (bootstrap(gap, [a, b], paired=paired, resampling=Resampling(400)) for paired in (True, False))
    assert paired.estimate == apart.estimate
    assert paired.deviation == pytest.approx((b - a).std() / np.sqrt(200), rel=0.15)
    assert apart.deviation > 5 * paired.deviation
    assert paired.low > 0 > apart.low


def test_resamples_keep_rows_together_and_repeat_with_their_seed():
    rows = np.stack([np.arange(20.0), -np.arange(20.0)], axis=1)
    seen = []

    def statistic(x):
        seen.append(x)
        return float(x[:, 0].mean())

    first = bootstrap(statistic, [rows], resampling=Resampling(5, seed=3))
    assert all((x[:, 0] == -x[:, 1]).all() and len(x) == 20 for x in seen)
    assert bootstrap(statistic, [rows], resampling=Resampling(5, seed=3)) == first
    assert bootstrap(statistic, [rows], resampling=Resampling(5, seed=4)) != first


@given(st.integers(0, 10_000))
def test_weights_count_repetitions(seed):
    generator = np.random.default_rng(seed)
    features = 100 + generator.normal(size=(12, 4))
    rows = generator.integers(12, size=12)
    got = weighted_statistics(features, np.bincount(rows, minlength=12))
    expected = feature_statistics(features[rows])
    assert np.allclose(got.mu, expected.mu, rtol=1e-13)
    assert np.allclose(got.sigma, expected.sigma, rtol=1e-9, atol=1e-12)
    assert got.n == 12


@pytest.mark.parametrize(("n", "m", "width"), [(14, 14, 40), (14, 60, 30), (60, 14, 30), (60, 50, 5), (8, 8, 8)])
@pytest.mark.parametrize("paired", [False, True])
def test_resampled_distances_are_those_of_copied_features(n, m, width, paired):
    if paired and n != m:
        return
    generator = np.random.default_rng(n)
    a, b = 3 + generator.normal(size=(n, width)), 3.3 + 1.5 * generator.normal(size=(m, width))
    resampled = []
    got = bootstrap_frechet(
        a, b, paired=paired, resampling=Resampling(5, "percentile", 0.5, seed=9), progress=resampled.append
    )
    draws = np.random.default_rng(9)
    expected = []
    for _ in range(5):
        rows = draws.integers(n, size=n)
        others = rows if paired else draws.integers(m, size=m)
        expected.append(frechet_of_features(a[rows], b[others]))
    again = interval_of(frechet_of_features(a, b), expected, 0.5, "percentile")
    assert (got.low, got.high, got.bias, got.deviation) == pytest.approx(
        (again.low, again.high, again.bias, again.deviation), rel=1e-6
    )
    assert got.estimate == pytest.approx(again.estimate, rel=1e-9)
    assert resampled == [1] * 5


def test_statistics_are_not_resampled():
    generator = np.random.default_rng(0)
    a = generator.normal(size=(50, 4))
    reference = FeatureStatistics(np.full(4, 0.5), np.diag([1.0, 2.0, 3.0, 4.0]), None)
    got = bootstrap_frechet(a, reference, resampling=Resampling(4, "centred", seed=1))
    draws = np.random.default_rng(1)
    expected = [frechet_distance(feature_statistics(a[draws.integers(50, size=50)]), reference) for _ in range(4)]
    assert got.deviation == pytest.approx(np.std(expected, ddof=1), rel=1e-6)
    with pytest.raises(UsageError, match="no images to pair"):
        bootstrap_frechet(a, reference, paired=True)


def test_the_bias_of_a_bootstrapped_distance_is_as_its_docstring_says():
    """One distribution on both sides: the truth is 0, the distance of n images is bias, and a resample has it twice."""
    generator = np.random.default_rng(0)
    values, centred, basic = [], [], []
    for trial in range(12):
        a, b = generator.normal(size=(2, 400, 10))
        values.append(frechet_of_features(a, b))
        centred.append(bootstrap_frechet(a, b, resampling=Resampling(60, "centred", seed=trial)))
        basic.append(bootstrap_frechet(a, b, resampling=Resampling(60, "basic", seed=trial)))
    expected = np.mean(values)
    assert np.mean([interval.bias for interval in centred]) == pytest.approx(expected, rel=0.15)
    # Percentiles would miss even the distance of the given images.
    assert all(interval.low + interval.bias > interval.estimate for interval in centred)
    assert sum(interval.low <= expected <= interval.high for interval in centred) >= 9
    assert np.mean([(interval.low + interval.high) / 2 for interval in basic]) == pytest.approx(0, abs=0.25 * expected)


def test_what_is_refused():
    x = np.arange(5.0)
    with pytest.raises(UsageError, match="unknown interval 'bca'; choose percentile, centred, basic"):
        bootstrap(np.mean, [x], resampling=Resampling(method="bca"))
    for options in ({"level": 1.0}, {"level": 0.0}, {"resamples": 1}):
        with pytest.raises(UsageError, match=r"level in 0\.\.1 and at least 2 resamples"):
            bootstrap(np.mean, [x], resampling=Resampling(**options))
    with pytest.raises(UsageError, match="at least one array"):
        bootstrap(np.mean, [])
    with pytest.raises(BadInputError, match="at least 2 images, got 1"):
        bootstrap(np.mean, [x[:1]])
    with pytest.raises(BadInputError, match=r"of the same seeds on all sides, got \[5, 4\]"):
        bootstrap(lambda a, b: float(a.mean() - b.mean()), [x, x[:4]], paired=True)
    with pytest.raises(BadInputError, match="of the same seeds"):
        bootstrap_frechet(np.eye(5), np.eye(5)[:4], paired=True)
    with pytest.raises(BadInputError, match="2 of 3 resamples have no finite score"):
        interval_of(0.0, [1.0, np.nan, np.inf], 0.9, "basic")
    for weights in (np.ones(4), -np.ones(5), np.zeros(5), np.array([1.0, 0, 0, 0, 0])):
        with pytest.raises(BadInputError, match="weights must be one per image"):
            weighted_statistics(np.eye(5), weights)
