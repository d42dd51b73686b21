"""Information between expert and position, step, class or branch: I(X;E) / H(E), with its interval and null.

Tables count selections: n(x, e), x one of X values of the variable, e one of E experts. Each of a token's k
selections counts once, so "the expert" is a selection drawn at random. Mutual information of counts is biased upwards,
the more the larger the table, and the tokens of an image are not independent draws. Hence

- images are resampled, never tokens;
- the interval is that of the bootstrap replicates v* less twice the bias. Replicates are to the value v what v is to
  the population's, so v* lies twice the bias mean(v*) - v too high: percentiles of v* itself miss the population's
  value as soon as tables are large. The basic interval 2 v - quantile(v*) is as free of bias, but mirrors the skew
  of v* (whose variance grows with its value) and covers slightly less;
- the null shuffles the variable within each image (labels between images for class), which keeps each image's
  marginals and dispersion and breaks only what images have in common.

With weak dependence the replicates vary more than the value does, so the interval errs on the wide side. With few
images per class that route very differently the bootstrap estimates too small a bias; the null is exact there, so the
interval reaches down to 0 whenever the null is not rejected. Tables need some four selections per cell: at one
per cell (8 images of 2 each, 256 positions, 16 experts) the bias is estimated badly, `corrected` lies up to 60 %
too high, and only half of the intervals hold the population's value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditmoe_cli.errors import BadInputError

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Null = Literal["permute-within-image", "shift-within-image"]

_NUMBERS_AT_ONCE = 1 << 17  # 1 MiB of float64: shuffled tables stay in the cache while images are added up


@dataclass(frozen=True)
class InformationEstimate:
    """Information between expert and variable, I(X;E) / H(E) in [0, 1].

    Attributes:
        value: that of the pooled counts, biased upwards.
        low, high: the confidence interval around `corrected`, cut off at 0 and at the largest value possible, so
            `value` may lie above `high`. `low` is 0 wherever the null is not rejected. Where nothing can be resampled
            (one image, or one image per class) the interval holds every possible value.
        null_mean, null_high: mean and upper quantile (at the confidence) of the value if the variable did not matter;
            a `value` above `null_high` is evidence that it does.
        excess: value - null_mean; under strong dependence it errs on the low side, where `corrected` does not.
        corrected: `value` less the bias that the bootstrap estimates, cut off likewise; `value` without a bootstrap.
    """

    value: float
    low: float
    high: float
    null_mean: float
    null_high: float
    excess: float
    corrected: float


def _x_log_x(values: Array) -> Array:
    """Return x ln x, 0 at 0."""
    result: Array = values * np.log(np.maximum(values, np.finfo(np.float64).tiny))
    return result


def _tables(tables: ArrayLike, axes: int, shape: str) -> Array:
    """Return `tables` as float64. Raises `BadInputError` where they are no counts of at least `axes` axes."""
    counts = np.asarray(tables, dtype=np.float64)
    if counts.ndim < axes or not counts.size:
        raise BadInputError(f"counts must be {shape}, none of them 0, got {counts.shape}")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise BadInputError("counts must be finite and not negative")
    return counts


def _information(tables: Array) -> Array:
    """Return I / H(E) of tables (..., X, E), shape (...).

    n ln n is summed over cells and marginals instead of p ln(p / (p p')) over cells: one logarithm a cell.
    """
    total = tables.sum(axis=(-2, -1))
    scale = np.where(total > 0, total, 1.0)
    experts = _x_log_x(tables.sum(axis=-2)).sum(axis=-1)
    rows = _x_log_x(tables.sum(axis=-1)).sum(axis=-1)
    whole = _x_log_x(total)
    information: Array = (_x_log_x(tables).sum(axis=(-2, -1)) - rows - experts + whole) / scale
    information = np.maximum(information, 0.0)
    entropy = (whole - experts) / scale
    # an entropy of rounding alone belongs to a single expert
    known = entropy > 1e-12
    result: Array = np.where(known, np.minimum(information / np.where(known, entropy, 1.0), 1.0), 0.0)
    return result


def normalised_mutual_information(table: ArrayLike) -> Array:
    """Return I(X;E) / H(E), I = Σ p(x,e) ln(p(x,e) / (p(x) p(e))), of counts (..., X, E); shape (...).

    It is the share of the expert's entropy that the variable explains, in [0, 1]; 0 where H(E) = 0, and for a table
    without counts. A variable of few values cannot reach 1: the most is H(X) / H(E). Source: Cover and Thomas, Elements
    of Information Theory, 2.3. Raises `BadInputError` for negative or infinite counts, or fewer than two axes.
    """
    return _information(_tables(table, 2, "(..., X, E)"))


def information_with_interval(
    tables: ArrayLike,
    *,
    replicates: int = 200,
    seed: int = 0,
    confidence: float = 0.95,
    null: Null = "permute-within-image",
) -> InformationEstimate:
    """Return the information between expert and position, step or branch, of which every image takes all values.

    `tables` (I, X, E) are the counts of each image. The value comes from their sum; the interval from `replicates`
    Poisson bootstraps over images (weights Poisson(1); replicates without any image are drawn anew); the null from
    as many shuffles of each image's X axis, independent between images. ``permute-within-image`` takes any
    permutation, which for X = 2 swaps the branches at random. ``shift-within-image`` takes cyclic shifts: neighbours
    stay neighbours, so that `null_high` holds where choices of neighbouring positions or steps go together. It
    suits axes of many values; on two they are the same.

    Raises `BadInputError` for tables of another shape, negative or infinite counts, or useless settings.
    """
    counts = _tables(tables, 3, "(I, X, E)")
    if counts.ndim != 3:
        raise BadInputError(f"counts must be (I, X, E), got {counts.shape}")
    _check_settings(replicates, seed, confidence)
    images = len(counts)
    weights = _poisson_weights(np.random.default_rng([seed, 0]), replicates, images)
    resampled = (weights @ counts.reshape(images, -1)).reshape(replicates, *counts.shape[1:])
    return _estimate(
        counts.sum(axis=0),
        resampled if images > 1 else None,
        _shuffled_information(counts, np.random.default_rng([seed, 1]), replicates, null),
        inflation=1.0,
        confidence=confidence,
    )


def class_information(
    per_image: ArrayLike,
    labels: ArrayLike,
    *,
    replicates: int = 200,
    seed: int = 0,
    confidence: float = 0.95,
) -> InformationEstimate:
    """Return the information between expert and class, from counts (I, E) of images with labels (I,).

    As `information_with_interval`, but images are drawn anew within each class (as many as it has, with
    replacement), as classes are chosen and not sampled, and the null shuffles the labels between images. Drawn from
    c images, a class varies by only 1 - 1/c of what it should; bias and variance are scaled up by C / Σ (1 - 1/c),
    C the number of classes. With one image per class, class and image cannot be distinguished, and the interval holds
    every possible value. Have four or more: with two, only some 80 to 87 % of 95 % intervals hold the population's
    value. Give the counts of the conditional branch: the other does not know the class.

    Raises `BadInputError` where shapes do not fit, or as `information_with_interval`.
    """
    counts = _tables(per_image, 2, "(I, E)")
    named = np.asarray(labels)
    if counts.ndim != 2 or named.shape != counts.shape[:1]:
        raise BadInputError(f"counts (I, E) need one label per image, got {counts.shape} and {named.shape}")
    _check_settings(replicates, seed, confidence)
    row, sizes = np.unique(named, return_inverse=True, return_counts=True)[1:]
    row, images = row.reshape(-1), len(counts)
    member = np.eye(len(sizes))[row]  # (I, C)
    resampling, shuffling = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    weights = np.empty((replicates, images))
    for c, size in enumerate(sizes):
        weights[:, row == c] = resampling.multinomial(size, np.full(size, 1 / size), size=replicates)
    orders = shuffling.permuted(np.broadcast_to(np.arange(images), (replicates, images)), axis=1)
    spread = float((1 - 1 / sizes).sum())
    return _estimate(
        member.T @ counts,
        _by_class(weights, member, counts) if spread else None,
        _information(np.stack([member[order].T @ counts for order in orders])),
        inflation=len(sizes) / spread if spread else 1.0,
        confidence=confidence,
    )


def _check_settings(replicates: int, seed: int, confidence: float) -> None:
    """Raise `BadInputError` for settings that give no interval."""
    if replicates < 2 or seed < 0 or not 0 < confidence < 1:
        raise BadInputError(
            "an interval needs 2 or more replicates, a seed from 0 and a confidence between 0 and 1; "
            f"got {replicates}, {seed} and {confidence}"
        )


def _poisson_weights(generator: np.random.Generator, replicates: int, images: int) -> Array:
    """Return Poisson(1) weights (R, I), no row of them all 0."""
    weights = generator.poisson(1.0, (replicates, images))
    while (empty := ~weights.any(axis=1)).any():
        weights[empty] = generator.poisson(1.0, (int(empty.sum()), images))
    result: Array = weights.astype(np.float64)
    return result


def _by_class(weights: Array, member: Array, counts: Array) -> Array:
    """Return the class tables (R, C, E) of images weighted by (R, I)."""
    result: Array = np.stack([(member * row[:, None]).T @ counts for row in weights])
    return result


def _shuffles(generator: np.random.Generator, shape: tuple[int, int, int], null: Null) -> Integers:
    """Return indices (R, I, X) that shuffle the X axis of every image in every replicate."""
    axis = np.arange(shape[-1], dtype=np.int64)
    if null == "shift-within-image":
        shifted: Integers = (axis + generator.integers(shape[-1], size=(*shape[:2], 1))) % shape[-1]
        return shifted
    return generator.permuted(np.broadcast_to(axis, shape), axis=-1)


def _shuffled_information(counts: Array, generator: np.random.Generator, replicates: int, null: Null) -> Array:
    """Return the information (R,) of pooled tables in which each image's X axis is shuffled."""
    if null not in ("permute-within-image", "shift-within-image"):
        raise BadInputError(f"there is no null called {null!r}")
    images, values, experts = counts.shape
    at_once = max(_NUMBERS_AT_ONCE // (values * experts), 1)
    results = []
    for start in range(0, replicates, at_once):
        size = min(at_once, replicates - start)
        order = _shuffles(generator, (size, images, values), null)
        pooled, drawn = np.zeros((2, size, values, experts))
        for image in range(images):
            np.take(counts[image], order[:, image], axis=0, out=drawn, mode="clip")
            pooled += drawn
        results.append(_information(pooled))
    return np.concatenate(results)


def _estimate(
    pooled: Array, resampled: Array | None, null: Array, *, inflation: float, confidence: float
) -> InformationEstimate:
    """Return value, interval and null of one variable.

    `pooled` (X, E) are the counts, `resampled` (R, X, E) their bootstrap replicates, or None where there can be
    none, `null` (R,) the information without dependence. `inflation` is the factor by which the replicates' variance,
    and with it their bias, falls short.
    """
    value = float(_information(pooled))
    # the value is one more draw under the null: this rank lets it pass with at least the confidence, exactly
    rank = min(math.ceil(confidence * (len(null) + 1)), len(null))
    null_mean, null_high = float(null.mean()), float(np.sort(null)[rank - 1])
    most = _largest(pooled)
    low, high, corrected = 0.0, most, value
    if resampled is not None:
        replicate = _information(resampled)
        centre = value - inflation * (float(replicate.mean()) - value)
        tails = np.quantile(replicate - replicate.mean(), [(1 - confidence) / 2, (1 + confidence) / 2])
        below, above = centre + np.sqrt(inflation) * tails
        low, high, corrected = (min(max(float(x), 0.0), most) for x in (below, above, centre))
    if value <= null_high:
        low = 0.0
    return InformationEstimate(value, low, high, null_mean, null_high, value - null_mean, corrected)


def _largest(table: Array) -> float:
    """Return the largest I / H(E) of a table (X, E): min(1, ln X / H(E)), and 0 where H(E) = 0."""
    share = table.sum(axis=0) / max(float(table.sum()), np.finfo(np.float64).tiny)
    entropy = -float(_x_log_x(share).sum())
    return min(1.0, float(np.log(len(table))) / entropy) if entropy > 1e-12 else 0.0
