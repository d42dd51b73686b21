"""Bootstrap intervals of statistics that compare blocks or step bins: the same images are drawn for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.routing.report.claims import Estimate, Trend

Array = NDArray[np.float64]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Bootstrap:
    """How many replicates R of the images are drawn, and their seed."""

    replicates: int
    seed: int


def bootstrap_curve(tables: NDArray[Any], statistic: Callable[[Array], Array], bootstrap: Bootstrap) -> Array:
    """Return a statistic of the sum of `tables` (I, ...) over images, and its bootstrap replicates, (1 + R, ...).

    `statistic` maps N sums (N, ...) to their N values or rows of values. The first row is the value less its bias, the
    others are the replicates less twice the bias (`report.information` says why); all are cut off at 0.
    """
    images, replicates = len(tables), bootstrap.replicates
    drawn = np.random.default_rng([bootstrap.seed, 2]).multinomial(images, np.full(images, 1 / images), replicates)
    flat = tables.reshape(images, -1).astype(np.float64)
    value = statistic(flat.sum(axis=0).reshape(1, *tables.shape[1:]))
    resampled = statistic((drawn.astype(np.float64) @ flat).reshape(replicates, *tables.shape[1:]))
    bias = resampled.mean(axis=0) - value[0]
    curves: Array = np.maximum(np.concatenate((value - bias, resampled - 2 * bias)), 0.0)
    return curves


def trend(curves: Array, size: int) -> Trend | None:
    """Return the change from the first `size` columns of curves (1 + R, X) to the last; None without any spread."""
    if size == 0 or not np.ptp(curves[1:], axis=0).any():
        return None
    early, late = curves[:, :size].mean(axis=1), curves[:, -size:].mean(axis=1)
    return Trend(estimate(early), estimate(late), estimate(late / np.maximum(early, 1e-6)))


def estimate(curve: Array) -> Estimate:
    """Return the value and interval of a curve (1 + R,)."""
    low, high = np.quantile(curve[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(curve[0]), float(low), float(high))
