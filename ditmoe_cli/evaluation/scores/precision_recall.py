"""Improved precision and recall (https://arxiv.org/abs/1904.06991): shares of images near the other set's images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.scores.feature_statistics import Array
from ditmoe_cli.progress import each

BLOCK = 2048


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares of subject images near the reference (precision) and of reference images near the subject; and k."""

    precision: float
    recall: float
    neighbours: int


def precision_recall(subject: Array, reference: Array, neighbours: int = 3, *, block: int = BLOCK) -> PrecisionRecall:
    """Return precision and recall of features `subject` (n, D) against `reference` (m, D).

    Around each image lies a ball whose radius is the distance to its k-th nearest other image of its own set,
    k = `neighbours`. Precision is the share of subject images in at least one ball of the reference, recall the share
    of reference images in at least one ball of the subject; the surface of a ball belongs to it. ADM and torch-fidelity
    (with features of Inception; its default is another network) count the same.

    Distances are computed `block` by `block`, so memory is that of the features and a few blocks whatever n and m.

    Raises `BadInputError` where a side is not finite and (images, D) with more than k images, or where widths differ;
    `UsageError` for a k or block below one.
    """
    if neighbours < 1 or block < 1:
        raise UsageError(f"precision and recall take at least 1 neighbour and block, got {neighbours} and {block}")
    a, b = (_checked(side, neighbours) for side in (subject, reference))
    if a.shape[1] != b.shape[1]:
        raise BadInputError(f"features of width {a.shape[1]} and {b.shape[1]} cannot be compared")
    centre = b.mean(axis=0)
    a, b = a - centre, b - centre
    a_radii, b_radii = (_radii(side, neighbours, block) for side in (a, b))
    a_inside, b_inside = np.zeros(len(a), dtype=bool), np.zeros(len(b), dtype=bool)
    for rows in each(_blocks(len(a), block), "comparing images", "blocks of images"):
        for columns in _blocks(len(b), block):
            squares = _squared_distances(a[rows], b[columns])
            a_inside[rows] |= (squares <= b_radii[columns]).any(axis=1)
            b_inside[columns] |= (squares <= a_radii[rows, None]).any(axis=0)
    return PrecisionRecall(float(a_inside.mean()), float(b_inside.mean()), neighbours)


def _radii(features: Array, neighbours: int, block: int) -> Array:
    """Return the squared distance of each image (n, D) to its k-th nearest other image, (n,).

    The image itself is the nearest of the k + 1 that are kept; each block of distances serves its rows and columns.
    """
    nearest = np.full((len(features), neighbours + 1), np.inf, dtype=features.dtype)
    for rows in each(_blocks(len(features), block), "looking for neighbours", "blocks of images"):
        for columns in _blocks(len(features), block):
            if columns.start < rows.start:
                continue
            squares = _squared_distances(features[rows], features[columns])
            if columns != rows:
                nearest[columns] = _least(nearest[columns], squares.T, neighbours)
            nearest[rows] = _least(nearest[rows], squares, neighbours)
    radii: Array = nearest.max(axis=1)
    return radii


def _least(nearest: Array, further: Array, neighbours: int) -> Array:
    """Return the neighbours + 1 smallest values of each row of both arrays."""
    both = np.concatenate([nearest, further], axis=1)
    return np.partition(both, neighbours, axis=1)[:, : neighbours + 1]


def _squared_distances(a: Array, b: Array) -> Array:
    """Return |x - y|² of all rows of a and b; differences within rounding count as zero."""
    squares: Array = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)
    rounding = 16 * np.finfo(a.dtype).eps * squares
    squares -= 2 * (a @ b.T)
    squares[squares < rounding] = 0.0
    return squares


def _blocks(length: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def _checked(features: Array, neighbours: int) -> Array:
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or not features.shape[1] or len(features) <= neighbours or not np.isfinite(features).all():
        raise BadInputError(
            f"precision and recall of {neighbours} neighbours take finite features (images, width) of more images than "
            f"that, got {features.shape}"
        )
    return features
