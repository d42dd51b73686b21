"""The Fréchet distance: closed forms and invariants."""

from __future__ import annotations

import numpy as np
import pytest

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.scores.feature_statistics import FeatureStatistics, feature_statistics
from ditmoe_cli.evaluation.scores.frechet import frechet_distance, frechet_of_features, frechet_to


def gaussian(dimension, seed):
    """Return statistics with a full covariance."""
    generator = np.random.default_rng(seed)
    factor = generator.normal(size=(dimension, dimension))
    return FeatureStatistics(generator.normal(size=dimension), factor @ factor.T / dimension, 1000)


def test_diagonal_gaussians():
    generator = np.random.default_rng(0)
    (mu_a, mu_b), (deviation_a, deviation_b) = generator.normal(size=(2, 7)), generator.uniform(0, 3, (2, 7))
    expected = ((mu_a - mu_b) ** 2).sum() + ((deviation_a - deviation_b) ** 2).sum()
    a = FeatureStatistics(mu_a, np.diag(deviation_a**2), 10)
    b = FeatureStatistics(mu_b, np.diag(deviation_b**2), 20)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_equal_covariances_leave_the_distance_of_the_means():
    a = gaussian(12, 0)
    b = FeatureStatistics(a.mu + np.arange(12.0), a.sigma, a.n)
    assert frechet_distance(a, b) == pytest.approx((np.arange(12.0) ** 2).sum(), rel=1e-10)


def test_scaled_covariance():
    a = gaussian(9, 0)
    b = FeatureStatistics(a.mu, 4 * a.sigma, a.n)
    assert frechet_distance(a, b) == pytest.approx(np.trace(a.sigma), rel=1e-10)


def test_distance_to_itself_is_zero_and_to_a_rounded_self_nearly():
    a = gaussian(20, 1)
    assert frechet_distance(a, a) == 0.0
    nudged = FeatureStatistics(a.mu.copy(), a.sigma * (1 + 1e-12), a.n)
    assert frechet_distance(a, nudged) == pytest.approx(0.0, abs=1e-10)


def test_symmetry():
    a, b = gaussian(15, 0), gaussian(15, 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, b) > 1


def test_rotating_and_shifting_both_changes_nothing():
    a, b = gaussian(15, 0), gaussian(15, 1)
    generator = np.random.default_rng(2)
    rotation, _ = np.linalg.qr(generator.normal(size=(15, 15)))
    shift = 100 * generator.normal(size=15)

    def moved(s):
        return FeatureStatistics(rotation @ s.mu + shift, rotation @ s.sigma @ rotation.T, s.n)

    assert frechet_distance(moved(a), moved(b)) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_full_rank_agrees_with_the_eigenvalues_of_the_product():
    a, b = gaussian(15, 0), gaussian(15, 1)
    cross = np.sqrt(np.linalg.eigvals(a.sigma @ b.sigma).real.clip(0)).sum()
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_fewer_images_than_features_agree_with_the_nuclear_norm():
    # tr (Σa Σb)^½ is the nuclear norm of A Bᵀ, A and B being the centred features over √(n - 1).
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(12, 64)), 1 + 2 * generator.normal(size=(17, 64))
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = means + (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()
    got = frechet_distance(feature_statistics(x), feature_statistics(y))
    assert got == pytest.approx(expected, rel=1e-6)


def test_widths_must_agree():
    with pytest.raises(BadInputError, match="statistics of 3 and of 4 features"):
        frechet_distance(gaussian(3, 0), gaussian(4, 0))


@pytest.mark.parametrize(("n", "m"), [(12, 17), (30, 30), (31, 200), (200, 12), (60, 31), (2, 2)])
def test_features_and_their_statistics_are_equally_far_apart(n, m):
    """At, below and above as many images as features (30)."""
    generator = np.random.default_rng(n)
    mix = generator.normal(size=(30, 30))
    a, b = 5 + generator.normal(size=(n, 30)) @ mix, 4 + generator.normal(size=(m, 30))
    expected = frechet_distance(feature_statistics(a), feature_statistics(b))
    assert frechet_of_features(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_of_features(b, a) == pytest.approx(expected, rel=1e-6)


def test_features_of_few_images_by_a_closed_form():
    # Three images along one axis, three along another: variances that share nothing, so no cross term.
    a, b = np.zeros((3, 9)), np.zeros((3, 9))
    a[:, 0], b[:, 1] = [0, 1, 2], [1, 4, 7]
    assert frechet_of_features(a, b) == pytest.approx(1 + 16 + 1 + 9, rel=1e-12)
    # Along the same axis the deviations subtract.
    c = np.zeros((3, 9))
    c[:, 0] = [1, 4, 7]
    assert frechet_of_features(a, c) == pytest.approx(9 + (3 - 1) ** 2, rel=1e-12)


def test_features_of_few_images_are_no_distance_from_themselves():
    a = np.random.default_rng(0).normal(size=(8, 40))
    assert frechet_of_features(a, a) == 0.0
    assert frechet_of_features(a, a[::-1]) == pytest.approx(0.0, abs=1e-12)
    # Where the eigenproblem of the singular product is off by far more.
    assert frechet_of_features(a, a + 1e-9) < 1e-12


def test_a_kept_root_gives_the_same_distances():
    reference = gaussian(12, 0)
    to = frechet_to(reference)
    for other in (gaussian(12, 1), reference, gaussian(12, 2)):
        assert to(other) == frechet_distance(reference, other)
    with pytest.raises(BadInputError, match="statistics of 12 and of 3 features"):
        to(gaussian(3, 0))


def test_features_that_are_refused():
    a = np.eye(4)
    for bad in (a[:1], a[0], a * np.nan):
        with pytest.raises(BadInputError, match="at least 2 images"):
            frechet_of_features(bad, a)
    with pytest.raises(BadInputError, match="features of 4 and of 3 dimensions"):
        frechet_of_features(a, a[:, :3])


INDEFINITE = np.array([[1.0, 9.0], [9.0, 1.0]])


@pytest.mark.parametrize("swapped", [False, True])
def test_no_distance_to_what_is_no_covariance(swapped):
    sides = FeatureStatistics(np.zeros(2), np.eye(2), None), FeatureStatistics(np.ones(2), INDEFINITE, None)
    with pytest.raises(BadInputError, match="a covariance has the eigenvalue -8"):
        frechet_distance(*(reversed(sides) if swapped else sides))


def test_distances_that_are_not_finite_are_refused():
    near = FeatureStatistics(np.zeros(2), np.eye(2), None)
    for far in (
        FeatureStatistics(np.full(2, 1e200), np.eye(2), None),
        FeatureStatistics(np.zeros(2), np.eye(2) * np.finfo(float).max, None),
    ):
        with pytest.raises(BadInputError, match=r"comes out as|too large"):
            frechet_distance(near, far)
