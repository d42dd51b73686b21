"""The kernel distance, KID over Inception features (https://arxiv.org/abs/1801.01401): an unbiased squared MMD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.scores.feature_statistics import Array


@dataclass(frozen=True)
class KernelDistance:
    """Mean over subsets, their standard deviation (divisor: their number), the value of each, and images in each."""

    mean: float
    deviation: float
    values: tuple[float, ...]
    size: int


def squared_mmd(a: Array, b: Array, *, degree: int = 3, coefficient: float = 1.0, gamma: float | None = None) -> float:
    """Return the unbiased squared maximum mean discrepancy of features a (n, D) and b (m, D), in float64.

    Σ_{i≠j} k(aᵢ, aⱼ) / n(n - 1) + Σ_{i≠j} k(bᵢ, bⱼ) / m(m - 1) - 2 Σ k(aᵢ, bⱼ) / nm, with the kernel
    k(x, y) = (γ x·y + coefficient)^degree, γ being 1/D unless given. Its mean over draws of images is the squared MMD
    of the two distributions at any n and m, so it can be below zero, where a Fréchet distance is biased upwards.

    Raises `BadInputError` where a side is not (images, D) with at least two images, or where widths differ.
    """
    a, b = _checked(a, b)
    scale = 1 / a.shape[1] if gamma is None else gamma

    def kernel(x: Array, y: Array) -> Array:
        values: Array = (x @ y.T * scale + coefficient) ** degree
        return values

    def within(x: Array) -> float:
        values = kernel(x, x)
        return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def kernel_distance(
    a: Array,
    b: Array,
    *,
    subsets: int = 100,
    size: int = 1000,
    degree: int = 3,
    coefficient: float = 1.0,
    gamma: float | None = None,
    seed: int = 2020,
    shrink: bool = False,
    progress: Callable[[int], None] | None = None,
) -> KernelDistance:
    """Return mean and deviation of `squared_mmd` over `subsets` draws of `size` images from a (n, D) and b (m, D).

    Images are drawn without replacement by one ``numpy.random.RandomState(seed)``, for each subset those of a, the
    scored set, and then those of b, the reference; torch-fidelity draws the same. `size` is cut to the smaller set with
    `shrink`, as clean-fid does, which draws by numpy's global generator. The deviation is that between subsets, which
    share images: it is not the standard error of the mean. `progress` is told of each subset.

    Raises `BadInputError` as `squared_mmd` does, and for fewer images than `size` without `shrink`; `UsageError` for no
    subset or a size below two.
    """
    a, b = _checked(a, b)
    fewest = min(len(a), len(b))
    if subsets < 1 or size < 2:
        raise UsageError(f"a kernel distance takes at least 1 subset of at least 2 images, got {subsets} of {size}")
    if fewest < size and not shrink:
        raise BadInputError(f"a kernel distance over subsets of {size} images needs as many, got {len(a)} and {len(b)}")
    size = min(size, fewest)
    generator = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        rows = [generator.choice(len(side), size, replace=False) for side in (a, b)]
        values.append(squared_mmd(a[rows[0]], b[rows[1]], degree=degree, coefficient=coefficient, gamma=gamma))
        if progress is not None:
            progress(1)
    return KernelDistance(float(np.mean(values)), float(np.std(values)), tuple(values), size)


def _checked(a: Array, b: Array) -> tuple[Array, Array]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    for side in (a, b):
        if side.ndim != 2 or len(side) < 2 or not side.shape[1]:
            raise BadInputError(f"a kernel distance takes (images, width) with at least 2 images, got {side.shape}")
    if a.shape[1] != b.shape[1]:
        raise BadInputError(f"features of width {a.shape[1]} and {b.shape[1]} cannot be compared")
    return a, b
