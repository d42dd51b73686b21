"""Fréchet distance at infinitely many images (https://arxiv.org/abs/1911.07023): a line through values at several N."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.scores.feature_statistics import Array, FeatureStatistics, feature_sums
from ditmoe_cli.evaluation.scores.frechet import frechet_to

SIZES = 15


@dataclass(frozen=True)
class Extrapolation:
    """The line value = intercept + slope / N through values at sizes N; `standard_error` is that of the intercept."""

    intercept: float
    slope: float
    standard_error: float
    sizes: tuple[int, ...]
    values: tuple[float, ...]


def extrapolate(sizes: Sequence[int], values: Sequence[float]) -> Extrapolation:
    """Fit values yⱼ at sizes Nⱼ by yⱼ = intercept + slope / Nⱼ, by least squares.

    The standard error is the ordinary one, s √(1/m + x̄² / Σ (xⱼ - x̄)²) with x = 1/N, m sizes and
    s² = Σ residual² / (m - 2). It assumes independent yⱼ: where sizes share images, as those of `frechet_infinity`
    do, it measures how straight the line is, and is too small for an error of the intercept.

    Raises `UsageError` for fewer than three sizes, or sizes that are all equal or below one.
    """
    n, y = np.asarray(sizes, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(n) != len(y) or len(n) < 3 or n.min() < 1 or n.min() == n.max():
        raise UsageError(f"extrapolation takes at least 3 values at differing sizes, got sizes {list(sizes)}")
    x = 1 / n
    spread = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / spread
    intercept = y.mean() - slope * x.mean()
    variance = ((y - intercept - slope * x) ** 2).sum() / (len(x) - 2)
    error = np.sqrt(variance * (1 / len(x) + x.mean() ** 2 / spread))
    return Extrapolation(
        float(intercept), float(slope), float(error), tuple(map(int, sizes)), tuple(float(value) for value in y)
    )


def sizes_for(images: int, dimension: int, points: int = SIZES) -> tuple[int, ...]:
    """Return `points` numbers of images, evenly spaced from max(⌈images / 10⌉, dimension + 1) to `images`.

    Below dimension + 1 images a covariance is singular, and the bias of the distance is no longer a line in 1/N. Raises
    `BadInputError` for fewer than 2 (dimension + 1) images, `UsageError` for fewer than three points.
    """
    if points < 3:
        raise UsageError(f"extrapolation takes at least 3 sizes, got {points}")
    least = max(-(-images // 10), dimension + 1)
    if images < 2 * (dimension + 1) or images - least < points - 1:
        needed = max(2 * (dimension + 1), dimension + points)
        raise BadInputError(
            f"extrapolating a distance over {dimension} features needs at least {needed} images, got {images}; "
            "make more, or take a narrower extractor"
        )
    return tuple(round(size) for size in np.linspace(least, images, points))


def frechet_infinity(
    features: Array, reference: FeatureStatistics, *, points: int = SIZES, seed: int | None = 0
) -> Extrapolation:
    """Return the Fréchet distance of `features` (N, D) to `reference` at infinitely many images (FID_∞).

    The distance of n images is biased upwards by about b/n, where b depends on the model, so the order of two models at
    few images may not be their true one. It is computed at `points` sizes (`sizes_for`), and a line in 1/n is extended
    to 1/n = 0. Subsets are nested: the first n images after a permutation by ``numpy.random.default_rng(seed)``, or in
    their order where `seed` is None (which is wrong for images that are sorted by class).

    Only the bias of `features` is removed; the reference keeps that of its own number of images. Raises `BadInputError`
    for too few images (`sizes_for`) and differing widths.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2:
        raise BadInputError(f"features must be (images, width), got {features.shape}")
    sizes = sizes_for(len(features), features.shape[1], points)
    order = np.arange(len(features)) if seed is None else np.random.default_rng(seed).permutation(len(features))
    distance = frechet_to(reference)
    sums = feature_sums(features[order[: sizes[0]]])
    values = [distance(sums.statistics())]
    for start, stop in pairwise(sizes):
        sums = sums.merge(feature_sums(features[order[start:stop]]))
        values.append(distance(sums.statistics()))
    return extrapolate(sizes, values)
