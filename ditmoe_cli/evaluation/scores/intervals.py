"""Bootstrap intervals over images (https://doi.org/10.1214/aos/1176344552): how a score varies with the images drawn.

Three intervals come from the same resamples. θ is the score of the given images, θ* that of a resample, q(p) the
quantile of θ* at p, β = mean θ* - θ, and α = 1 - level:

- ``percentile``: q(α/2) to q(1 - α/2), for scores whose bias does not depend on the number of images.
- ``centred``: the same less β, for the score of other sets of as many images, with the bias of that number.
- ``basic``: 2θ - q(1 - α/2) to 2θ - q(α/2), around θ - β, for the score of infinitely many images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.scores.feature_statistics import Array, FeatureStatistics, feature_statistics
from ditmoe_cli.evaluation.scores.frechet import frechet_of_features, frechet_to
from ditmoe_cli.progress import each

METHODS = ("percentile", "centred", "basic")


@dataclass(frozen=True)
class Resampling:
    """Number of resamples and seed of their draws; level and method (one of `METHODS`) of the interval."""

    resamples: int = 1000
    method: str = "percentile"
    level: float = 0.95
    seed: int = 0


FRECHET_RESAMPLING = Resampling(200, "centred")
_RESAMPLING = Resampling()


@dataclass(frozen=True)
class Interval:
    """A score and its interval of confidence `level`.

    `bias` is mean θ* - θ, `deviation` the standard deviation of θ* (divisor: resamples - 1), that is, the standard
    error.
    """

    estimate: float
    low: float
    high: float
    level: float
    method: str
    bias: float
    deviation: float
    resamples: int


def interval_of(estimate: float, resampled: Sequence[float] | Array, level: float, method: str) -> Interval:
    """Return the interval by one of `METHODS` from the scores of resamples.

    Raises `UsageError` for another method, a level outside 0..1 or fewer than two resamples, and `BadInputError` for
    scores of resamples that are not finite.
    """
    _check_options(len(resampled), level, method)
    values = np.asarray(resampled, dtype=np.float64)
    if not np.isfinite(values).all():
        raise BadInputError(f"{int((~np.isfinite(values)).sum())} of {len(values)} resamples have no finite score")
    tail = (1 - level) / 2
    low, high = (float(value) for value in np.quantile(values, [tail, 1 - tail]))
    bias = float(values.mean() - estimate)
    if method == "centred":
        low, high = low - bias, high - bias
    if method == "basic":
        low, high = 2 * estimate - high, 2 * estimate - low
    return Interval(estimate, low, high, level, method, bias, float(values.std(ddof=1)), len(values))


def bootstrap(
    statistic: Callable[..., float],
    arrays: Sequence[NDArray[Any]],
    *,
    paired: bool = False,
    resampling: Resampling = _RESAMPLING,
) -> Interval:
    """Return the interval of ``statistic(*arrays)``, each array holding one entry or row per image.

    A resample draws as many images as there are, with replacement, by ``numpy.random.default_rng(seed)``: from each
    array separately, or with `paired` the same from all, for arrays whose images i have the same seed. Pairing suits a
    difference between two checkpoints, since the variation by seeds cancels.

    Statistics that look for equal images (precision and recall, kernel distances with their i ≠ j) are misled by the
    repetitions of a resample; pass per-image terms (whether each image lies inside) and their mean instead.

    Raises `UsageError` as `interval_of` does and where no array is given, `BadInputError` where an array holds fewer
    than two images, or paired arrays differ in length.
    """
    _check_options(resampling.resamples, resampling.level, resampling.method)
    if not arrays:
        raise UsageError("a bootstrap takes at least one array")
    counts = [len(array) for array in arrays]
    _check_counts(counts, paired)
    generator = np.random.default_rng(resampling.seed)
    scores = []
    for _ in each(range(resampling.resamples), "resampling", "resamples"):
        rows = _drawn(generator, counts, paired)
        scores.append(float(statistic(*(array[chosen] for array, chosen in zip(arrays, rows, strict=True)))))
    return interval_of(float(statistic(*arrays)), scores, resampling.level, resampling.method)


def bootstrap_frechet(
    a: Array,
    b: Array | FeatureStatistics,
    *,
    paired: bool = False,
    resampling: Resampling = FRECHET_RESAMPLING,
    progress: Callable[[int], None] | None = None,
) -> Interval:
    """Return the interval of the Fréchet distance of features a (n, D) to b: features (m, D), or fixed statistics.

    A resample gives image i of a the weight wᵢ, the number of times it is drawn: multinomial over n draws. Mean and
    covariance are the weighted Σ wᵢ xᵢ / n and Σ wᵢ (xᵢ - μ)(xᵢ - μ)ᵀ / (n - 1), so that nothing is copied. Features b
    are resampled too, with weights of their own, or with those of a where `paired` (images i of both have the same
    seed); statistics are not.

    A bootstrapped distance is biased twice. The distance of n images lies about β/n above that of infinitely many
    (β depends on the model), and a resample lies as much again above that of the n images, which it is drawn from, so
    percentiles miss the score itself. ``centred``, the default, subtracts that bias once, for the distance at this
    number of images, to be compared with others at the same number. ``basic`` subtracts it twice, for the distance at
    infinitely many images; as long as n is not far above D the bias is no line in 1/n, and `frechet_infinity` is more
    exact.

    Where a side has no more images than features, a resample takes the singular values of one n x m matrix, else the
    D x D eigenvalues of `frechet_distance`, which at D = 2048 are seconds each. `progress` is called after each.

    Raises `UsageError` as `interval_of` does, and for `paired` with statistics; `BadInputError` where features are not
    finite and (images, D) with at least two images, widths differ, or paired numbers of images differ.
    """
    _check_options(resampling.resamples, resampling.level, resampling.method)
    generator = np.random.default_rng(resampling.seed)
    a = np.asarray(a, dtype=np.float64)
    scores: list[float] = []
    if isinstance(b, FeatureStatistics):
        if paired:
            raise UsageError("a paired bootstrap needs the features of both sides; statistics have no images to pair")
        distance = frechet_to(b)
        estimate = distance(feature_statistics(a))
        _check_counts([len(a)], paired)
        resampled = _resampled_to_statistics(a, distance)
        counts = [len(a)]
    else:
        b = np.asarray(b, dtype=np.float64)
        estimate = frechet_of_features(a, b)
        counts = [len(a), len(b)]
        _check_counts(counts, paired)
        resampled = _resampled_products(a, b) if min(counts) <= a.shape[1] else _resampled_moments(a, b)
    for _ in range(resampling.resamples):
        rows = _drawn(generator, counts, paired)
        weights = [
            np.bincount(chosen, minlength=count).astype(np.float64) for chosen, count in zip(rows, counts, strict=True)
        ]
        scores.append(resampled(weights))
        if progress is not None:
            progress(1)
    return interval_of(estimate, scores, resampling.level, resampling.method)


def weighted_statistics(features: Array, weights: Array) -> FeatureStatistics:
    """Return μ = Σ wᵢ xᵢ / n and Σ wᵢ (xᵢ - μ)(xᵢ - μ)ᵀ / (n - 1) of features (N, D), n = Σ wᵢ.

    With whole weights these are the statistics of features in which image i occurs wᵢ times. Raises `BadInputError`
    where weights are not one per image, negative, or sum to no more than one.
    """
    features, weights = np.asarray(features, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if weights.shape != features.shape[:1] or weights.min() < 0 or weights.sum() <= 1:
        raise BadInputError(f"weights must be one per image, none negative, of sum above 1, got {weights.shape}")
    count = float(weights.sum())
    drawn = weights > 0
    features, weights = features[drawn], weights[drawn]
    mean = weights @ features / count
    centred = (features - mean) * np.sqrt(weights)[:, None]
    return FeatureStatistics(mean, centred.T @ centred / (count - 1), round(count))


def _resampled_to_statistics(a: Array, to: Callable[[FeatureStatistics], float]) -> Callable[[list[Array]], float]:
    """Return the distance `to` fixed statistics as a function of the weights of a."""

    def distance(weights: list[Array]) -> float:
        return to(weighted_statistics(a, weights[0]))

    return distance


def _resampled_moments(a: Array, b: Array) -> Callable[[list[Array]], float]:
    """Return the distance of a and b as a function of their weights, by means and covariances."""

    def distance(weights: list[Array]) -> float:
        left, right = (weighted_statistics(side, w) for side, w in zip((a, b), weights, strict=True))
        return frechet_to(left)(right)

    return distance


def _resampled_products(a: Array, b: Array) -> Callable[[list[Array]], float]:
    """Return the distance of a and b as a function of their weights, by products of images, computed once."""
    origin = b.mean(axis=0)
    a, b = a - origin, b - origin
    products = a @ b.T
    squares = [(side**2).sum(axis=1) for side in (a, b)]

    def distance(weights: list[Array]) -> float:
        w, v = weights
        n, m = w.sum(), v.sum()
        means = [w @ a / n, v @ b / m]
        traces = [
            (weight @ square - count * (mean @ mean)) / (count - 1)
            for weight, square, count, mean in zip(weights, squares, (n, m), means, strict=True)
        ]
        # Centring subtracts from each product those of its images with the other side's mean.
        rows, columns = w > 0, v > 0
        inner = products[np.ix_(rows, columns)]
        inner = inner - (products[rows] @ v / m)[:, None] - w @ products[:, columns] / n + means[0] @ means[1]
        inner *= np.sqrt(w[rows] / (n - 1))[:, None] * np.sqrt(v[columns] / (m - 1))
        cross = float(np.linalg.svd(inner, compute_uv=False).sum())
        return max(float(((means[0] - means[1]) ** 2).sum() + sum(traces) - 2 * cross), 0.0)

    return distance


def _drawn(generator: np.random.Generator, counts: Sequence[int], paired: bool) -> list[NDArray[np.int64]]:
    if paired:
        return [generator.integers(counts[0], size=counts[0])] * len(counts)
    return [generator.integers(count, size=count) for count in counts]


def _check_options(resamples: int, level: float, method: str) -> None:
    if method not in METHODS:
        raise UsageError(f"unknown interval {method!r}; choose {', '.join(METHODS)}")
    if not 0 < level < 1 or resamples < 2:
        raise UsageError(f"a bootstrap takes a level in 0..1 and at least 2 resamples, got {level} and {resamples}")


def _check_counts(counts: Sequence[int], paired: bool) -> None:
    if min(counts) < 2:
        raise BadInputError(f"a bootstrap needs at least 2 images, got {min(counts)}")
    if paired and len(set(counts)) > 1:
        raise BadInputError(
            f"a paired bootstrap needs images of the same seeds on all sides, got {list(counts)} of them"
        )
