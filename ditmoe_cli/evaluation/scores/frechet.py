"""The Fréchet distance between Gaussians (FID over Inception features, https://arxiv.org/abs/1706.08500)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.scores.feature_statistics import (
    ROUNDING,
    Array,
    FeatureStatistics,
    feature_statistics,
)

_CROSS_ROUNDING = 1e-3  # roots of eigenvalues that rounding made out of zeros add up


def _symmetric_root(matrix: Array) -> Array:
    """Return the square root of a covariance; eigenvalues below zero by rounding are clipped.

    Raises `BadInputError` for eigenvalues that are further below zero.
    """
    values, vectors = np.linalg.eigh(matrix)
    _require_covariance(values)
    root: Array = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    return root


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return ‖μa - μb‖² + tr Σa + tr Σb - 2 tr (Σa Σb)^½, in float64.

    The trace of the root is Σ √λ of the symmetric R Σb R, R = Σa^½: eigenvalues of a symmetric matrix, where
    the usual root of the product is neither symmetric nor, for few images, well conditioned.

    Raises `BadInputError` where the dimensions differ, or a side is no mean and covariance.
    """
    return frechet_to(a)(b)


def frechet_to(reference: FeatureStatistics) -> Callable[[FeatureStatistics], float]:
    """Return a function from statistics to their `frechet_distance` to `reference`, whose root is computed once."""
    roots: list[Array] = []

    def distance(other: FeatureStatistics) -> float:
        if other.dimension != reference.dimension:
            widths = f"{reference.dimension} and of {other.dimension}"
            raise BadInputError(f"statistics of {widths} features cannot be compared")
        if np.array_equal(reference.mu, other.mu) and np.array_equal(reference.sigma, other.sigma):
            return 0.0
        if not roots:
            roots.append(_symmetric_root(reference.sigma))
        with np.errstate(over="ignore", invalid="ignore"):
            inner = roots[0] @ other.sigma @ roots[0]
            inner = (inner + inner.T) / 2
            traces = np.trace(reference.sigma) + np.trace(other.sigma)
        if not np.isfinite(inner).all():
            raise BadInputError("the covariances are too large to be multiplied in float64; are the features whole?")
        values = np.linalg.eigvalsh(inner)
        _require_covariance(values)
        cross = float(np.sqrt(values.clip(min=0.0)).sum())
        return _distance(reference.mu - other.mu, traces, cross)

    return distance


def frechet_of_features(a: Array, b: Array) -> float:
    """Return the `frechet_distance` of features a (n, D) and b (m, D).

    Where a side has no more images than features, tr (Σa Σb)^½ is the nuclear norm (the sum of the singular values) of
    A Bᵀ, A and B being the centred features over √(n - 1) and √(m - 1): exact, without the D x D eigenproblem,
    whose zero eigenvalues rounding would turn into √rounding each. Otherwise mean and covariance are compared.

    Raises `BadInputError` where features are not finite and (images, D) with at least two images, or widths differ.
    """
    a, b = (_checked(side) for side in (a, b))
    if a.shape[1] != b.shape[1]:
        raise BadInputError(f"features of {a.shape[1]} and of {b.shape[1]} dimensions cannot be compared")
    if min(len(a), len(b)) > a.shape[1]:
        return frechet_distance(feature_statistics(a), feature_statistics(b))
    if np.array_equal(a, b):
        return 0.0
    means = [side.mean(axis=0) for side in (a, b)]
    left, right = ((side - mean) / np.sqrt(len(side) - 1) for side, mean in zip((a, b), means, strict=True))
    cross = float(np.linalg.svd(left @ right.T, compute_uv=False).sum())
    return _distance(means[0] - means[1], (left**2).sum() + (right**2).sum(), cross)


def _distance(difference: Array, traces: float, cross: float) -> float:
    """Return ‖difference‖² + traces - 2 cross; a distance below zero by rounding is 0.

    Raises `BadInputError` for one that is further below zero, or not finite: such sides are no means and covariances.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        apart = float((difference**2).sum() + traces)
        distance = apart - 2 * cross
    if not np.isfinite(distance) or distance < -_CROSS_ROUNDING * apart:
        raise BadInputError(f"the distance comes out as {distance:.4g}; the sides are no means and covariances")
    return max(distance, 0.0)


def _require_covariance(values: NDArray[np.floating[Any]]) -> None:
    """Raise `BadInputError` for eigenvalues, ascending, of which the first is below zero by more than rounding."""
    if values[0] < -ROUNDING * np.abs(values).sum():
        raise BadInputError(f"a covariance has the eigenvalue {values[0]:.3g}, a variance below 0; it is none")


def _checked(features: Array) -> Array:
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2 or not np.isfinite(features).all():
        raise BadInputError(f"features must be finite and (images, width) with at least 2 images, got {features.shape}")
    return features
