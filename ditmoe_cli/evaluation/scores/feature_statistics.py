"""Mean and covariance of features, in float64, mergeable across batches and processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean `mu` (D,) and covariance `sigma` (D, D, divisor n - 1) of the features of `n` images.

    `n` is None for statistics of other programs, which may not record it.
    """

    mu: Array
    sigma: Array
    n: int | None

    @property
    def dimension(self) -> int:
        """Width of the features."""
        return len(self.mu)


ROUNDING = 1e-6  # of a covariance's trace or largest entry, as from storage or sums in float32


def check_moments(mu: Array, sigma: Array, names: tuple[str, str] = ("mu", "sigma")) -> None:
    """Raise `BadInputError` unless `mu` is a mean (D,) and `sigma` a covariance (D, D) of it; `names` name the two.

    A covariance is finite, symmetric and positive semi-definite, each to within rounding: no eigenvalue lies below
    -1e-6 of the trace, which Σ + 1e-6 tr Σ · I having a Cholesky factor shows.
    """
    mean, covariance = names
    if mu.ndim != 1 or not mu.size or sigma.shape != (mu.size, mu.size):
        raise BadInputError(f"{mean} is {mu.shape} and {covariance} {sigma.shape}; they must be (D,) and (D, D)")
    for name, values in ((mean, mu), (covariance, sigma)):
        if not np.isfinite(values).all():
            raise BadInputError(f"{name} holds NaN or infinite values")
    scale = float(np.abs(sigma).max())
    if not scale:
        return
    unit = sigma / scale  # sums of its entries neither overflow nor underflow
    gap = float(np.abs(unit - unit.T).max())
    if gap > ROUNDING:
        raise BadInputError(f"{covariance} differs from its transpose by {gap * scale:.3g}; it is no covariance")
    least = float(unit.diagonal().min())
    if least < -ROUNDING:
        raise BadInputError(f"{covariance} holds the variance {least * scale:.3g}; it is no covariance")
    slack = ROUNDING * max(1.0, float(np.trace(unit)))
    try:
        np.linalg.cholesky((unit + unit.T) / 2 + slack * np.eye(len(mu)))
    except np.linalg.LinAlgError:
        lowest = float(np.linalg.eigvalsh((unit + unit.T) / 2)[0]) * scale
        raise BadInputError(
            f"{covariance} has the eigenvalue {lowest:.3g}, a variance below 0; it is no covariance"
        ) from None


@dataclass(frozen=True)
class FeatureSums:
    """n, Σx and Σxxᵀ about a fixed `origin`, which keeps float64 exact where features lie far from zero.

    Sums about the same origin merge by addition.
    """

    n: int
    total: Array
    products: Array
    origin: Array

    def merge(self, other: FeatureSums) -> FeatureSums:
        """Return the sums over both sets of images; `other` is moved to this origin."""
        shift = other.origin - self.origin
        total = other.total + other.n * shift
        cross = np.outer(other.total, shift)
        products = other.products + cross + cross.T + other.n * np.outer(shift, shift)
        return FeatureSums(self.n + other.n, self.total + total, self.products + products, self.origin)

    def statistics(self) -> FeatureStatistics:
        """Return mean and covariance. Raises `BadInputError` for fewer than two images."""
        if self.n < 2:
            raise BadInputError(f"statistics need at least 2 images, got {self.n}")
        mean = self.total / self.n
        sigma = (self.products - self.n * np.outer(mean, mean)) / (self.n - 1)
        return FeatureStatistics(mean + self.origin, sigma, self.n)


def feature_sums(features: Array) -> FeatureSums:
    """Return the sums of features (n, D) about their own mean. Raises `BadInputError` for other shapes and NaN."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or not len(features):
        raise BadInputError(f"features must be (images, width) with at least one image, got {features.shape}")
    if not np.isfinite(features).all():
        raise BadInputError("features hold NaN or infinite values; are the images whole?")
    origin = features.mean(axis=0)
    centred = features - origin
    return FeatureSums(len(features), centred.sum(axis=0), centred.T @ centred, origin)


def feature_statistics(features: Array) -> FeatureStatistics:
    """Return mean and covariance of features (n, D). Raises `BadInputError` as `feature_sums` does."""
    return feature_sums(features).statistics()
