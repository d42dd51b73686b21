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
