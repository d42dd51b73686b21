"""The kernel distance, KID over Inception features (https://arxiv.org/abs/1801.01401): an unbiased squared MMD."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.scores.conventions import KernelSubsets
from ditmoe_cli.evaluation.scores.feature_statistics import Array
from ditmoe_cli.progress import each

DEFAULT_SUBSETS = KernelSubsets()


@dataclass(frozen=True)
class KernelDistance:
    """Mean over subsets, standard deviation (divisor: number of subsets), value of each, and images in each."""

    mean: float
    deviation: float
    values: tuple[float, ...]
    size: int


def squared_mmd(a: Array, b: Array, *, degree: int = 3, coefficient: float = 1.0) -> float:
    """Return the unbiased squared maximum mean discrepancy of features a (n, D) and b (m, D), in float64.

    Σ_{i≠j} k(aᵢ, aⱼ) / n(n - 1) + Σ_{i≠j} k(bᵢ, bⱼ) / m(m - 1) - 2 Σ k(aᵢ, bⱼ) / nm, with the kernel
    k(x, y) = (x·y / D + coefficient)^degree. Its mean over draws of images is the squared MMD of the two distributions
    at any n and m, where a Fréchet distance is biased upwards; a single value can be below zero.

    Raises `BadInputError` where a side is not (images, D) with at least two images, or where widths differ.
    """
    a, b = _checked(a, b)
    scale = 1 / a.shape[1]

    def kernel(x: Array, y: Array) -> Array:
        values: Array = (x @ y.T * scale + coefficient) ** degree
        return values

    def within(x: Array) -> float:
        values = kernel(x, x)
        return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def kernel_distance(subject: Array, reference: Array, settings: KernelSubsets = DEFAULT_SUBSETS) -> KernelDistance:
    """Return mean and deviation of `squared_mmd` over draws of images of subject (n, D) and reference (m, D).

    Images are drawn without replacement by one ``numpy.random.RandomState(seed)``, for each subset those of the subject
    and then those of the reference; torch-fidelity draws the same. With `shrink` the size is cut to the smaller set, as
    clean-fid does, which draws by numpy's global generator. The deviation is that between subsets, which share images:
    it is not the standard error of the mean.

    Raises `BadInputError` as `squared_mmd` does, and for fewer images than a subset has without `shrink`; `UsageError`
    for no subset or a size below two.
    """
    a, b = _checked(subject, reference)
    fewest, size = min(len(a), len(b)), settings.size
    if settings.subsets < 1 or size < 2:
        raise UsageError(
            f"a kernel distance takes at least 1 subset of at least 2 images, got {settings.subsets} of {size}"
        )
    if fewest < size and not settings.shrink:
        raise BadInputError(f"a kernel distance over subsets of {size} images needs as many, got {len(a)} and {len(b)}")
    size = min(size, fewest)
    generator = np.random.RandomState(settings.seed)
    values = []
    for _ in each(range(settings.subsets), "comparing subsets of images", "subsets"):
        rows = [generator.choice(len(side), size, replace=False) for side in (a, b)]
        values.append(squared_mmd(a[rows[0]], b[rows[1]], degree=settings.degree, coefficient=settings.coefficient))
    return KernelDistance(float(np.mean(values)), float(np.std(values)), tuple(values), size)


def _checked(a: Array, b: Array) -> tuple[Array, Array]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    for side in (a, b):
        if side.ndim != 2 or len(side) < 2 or not side.shape[1]:
            raise BadInputError(f"a kernel distance takes (images, width) with at least 2 images, got {side.shape}")
    if a.shape[1] != b.shape[1]:
        raise BadInputError(f"features of width {a.shape[1]} and {b.shape[1]} cannot be compared")
    return a, b
