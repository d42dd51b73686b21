"""Improved precision and recall (https://arxiv.org/abs/1904.06991): shares of images inside the other set's balls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.scores.feature_statistics import Array

BLOCK = 2048

Floats = NDArray[Any]  # float32 or float64


@dataclass(frozen=True)
class PrecisionRecall:
    """Share of scored images among the reference (precision), of reference images among the scored (recall), and k."""

    precision: float
    recall: float
    neighbours: int

    @property
    def f_score(self) -> float:
        """Harmonic mean of both; 0 where both are."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def precision_recall(
    subject: Array, reference: Array, neighbours: int = 3, *, block: int = BLOCK, dtype: str = "float64"
) -> PrecisionRecall:
    """Return precision and recall of features `subject` (n, D) against `reference` (m, D).

    Around each image lies a ball whose radius is the distance to its k-th nearest other image of its own set,
    k = `neighbours`. Precision is the share of subject images in at least one ball of the reference, recall the share
    of reference images in at least one ball of the subject; on the surface counts as inside. ADM and torch-fidelity
    (with features of Inception; its default is another network) count alike.

    Distances are taken `block` by `block`, so memory is that of the features and a few blocks whatever n and m. `dtype`
    is what they are computed in: float32 takes half the time, and tips pairs that lie on a surface within rounding.

    Raises `BadInputError` where a side is not finite and (images, D) with more than k images, or where widths differ;
    `UsageError` for a k or block below one, and for another dtype.
    """
    _check_options(neighbours, block, dtype)
    a, b = (_checked(side, neighbours) for side in (subject, reference))
    if a.shape[1] != b.shape[1]:
        raise BadInputError(f"features of width {a.shape[1]} and {b.shape[1]} cannot be compared")
    centre = b.mean(axis=0)
    a, b = ((side - centre).astype(dtype) for side in (a, b))
    a_radii, b_radii = (_radii(side, neighbours, block) for side in (a, b))
    a_inside, b_inside = np.zeros(len(a), dtype=bool), np.zeros(len(b), dtype=bool)
    for rows in _blocks(len(a), block):
        for columns in _blocks(len(b), block):
            squares = _squared_distances(a[rows], b[columns])
            a_inside[rows] |= (squares <= b_radii[columns]).any(axis=1)
            b_inside[columns] |= (squares <= a_radii[rows, None]).any(axis=0)
    return PrecisionRecall(float(a_inside.mean()), float(b_inside.mean()), neighbours)


def squared_radii(features: Array, neighbours: int = 3, *, block: int = BLOCK, dtype: str = "float64") -> Floats:
    """Return for each of features (n, D) the squared distance to its k-th nearest other image, (n,).

    Raises as `precision_recall` does.
    """
    _check_options(neighbours, block, dtype)
    checked = _checked(features, neighbours)
    return _radii((checked - checked.mean(axis=0)).astype(dtype), neighbours, block)


def _radii(features: Floats, neighbours: int, block: int) -> Floats:
    """The image itself is the nearest of the neighbours + 1 that are kept; each block serves its rows and columns."""
    nearest = np.full((len(features), neighbours + 1), np.inf, dtype=features.dtype)
    for rows in _blocks(len(features), block):
        for columns in _blocks(len(features), block):
            if columns.start < rows.start:
                continue
            squares = _squared_distances(features[rows], features[columns])
            if columns != rows:
                nearest[columns] = _least(nearest[columns], squares.T, neighbours)
            nearest[rows] = _least(nearest[rows], squares, neighbours)
    return nearest.max(axis=1)  # type: ignore[no-any-return]


def _least(kept: Floats, further: Floats, neighbours: int) -> Floats:
    """Return the neighbours + 1 smallest of each row of both."""
    both = np.concatenate([kept, further], axis=1)
    return np.partition(both, neighbours, axis=1)[:, : neighbours + 1]


def _squared_distances(a: Floats, b: Floats) -> Floats:
    """Return |x - y|² of all rows of a and b; what rounding leaves of equal rows is zero."""
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)
    rounding = 16 * np.finfo(a.dtype).eps * squares
    squares -= 2 * (a @ b.T)
    squares[squares < rounding] = 0.0
    return squares  # type: ignore[no-any-return]


def _blocks(length: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, length)) for start in range(0, length, block))


def _check_options(neighbours: int, block: int, dtype: str) -> None:
    if neighbours < 1 or block < 1:
        raise UsageError(f"precision and recall take at least 1 neighbour and block, got {neighbours} and {block}")
    if dtype not in ("float32", "float64"):
        raise UsageError(f"distances are computed in float32 or float64, not {dtype!r}")


def _checked(features: Array, neighbours: int) -> Array:
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or not features.shape[1] or len(features) <= neighbours or not np.isfinite(features).all():
        raise BadInputError(
            f"precision and recall of {neighbours} neighbours take finite features (images, width) of more images than "
            f"that, got {features.shape}"
        )
    return features
