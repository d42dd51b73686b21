"""The Fréchet distance between Gaussians (FID over Inception features, https://arxiv.org/abs/1706.08500)."""

from __future__ import annotations

import numpy as np

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.statistics import Array, FeatureStatistics


def _symmetric_root(matrix: Array) -> Array:
    """Return the square root of a positive semi-definite matrix; rounding below zero is clipped."""
    values, vectors = np.linalg.eigh(matrix)
    root: Array = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    return root


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return ‖μa - μb‖² + tr Σa + tr Σb - 2 tr (Σa Σb)^½, in float64.

    The trace of the root is Σ √λ of the symmetric R Σb R, R = Σa^½: eigenvalues of a symmetric matrix, where
    the usual root of the product is neither symmetric nor, for few images, well conditioned.

    Raises `BadInputError` where the dimensions differ.
    """
    if a.dimension != b.dimension:
        raise BadInputError(f"statistics of {a.dimension} and of {b.dimension} features cannot be compared")
    if np.array_equal(a.mu, b.mu) and np.array_equal(a.sigma, b.sigma):
        return 0.0
    root = _symmetric_root(a.sigma)
    inner = root @ b.sigma @ root
    values = np.linalg.eigvalsh((inner + inner.T) / 2)
    cross = float(np.sqrt(values.clip(min=0.0)).sum())
    distance = float(((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross)
    return max(distance, 0.0)
