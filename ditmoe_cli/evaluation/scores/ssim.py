"""Structural similarity of image pairs (Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError

WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03
_IMAGES_AT_ONCE = 16


def ssim(a: NDArray[Any], b: NDArray[Any], data_range: float) -> NDArray[np.float64]:
    """Return the structural similarity of each pair of images a and b (N, H, W, C), as (N,).

    SSIM = (2 μ_a μ_b + C₁)(2 σ_ab + C₂) / ((μ_a² + μ_b² + C₁)(σ_a² + σ_b² + C₂)), C_i = (K_i · data_range)², moments
    under a Gaussian window; the mean over all positions of the window inside the image, and over channels. 1 for equal
    images. Raises `BadInputError` where the shapes differ or hold no pixel.
    """
    if a.shape != b.shape or a.ndim != 4 or not a.size:
        raise BadInputError(f"images of shape {a.shape} and {b.shape}: SSIM needs pairs of equal shape (N, H, W, C)")
    parts = [_ssim(a[i : i + _IMAGES_AT_ONCE], b[i : i + _IMAGES_AT_ONCE], data_range) for i in _starts(len(a))]
    return np.concatenate(parts)


def _starts(images: int) -> range:
    return range(0, images, _IMAGES_AT_ONCE)


def _ssim(a: NDArray[Any], b: NDArray[Any], data_range: float) -> NDArray[np.float64]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    window = gaussian_window(window_size(min(a.shape[1:3])))
    mean_a, mean_b = smooth(a, window), smooth(b, window)
    var_a, var_b = smooth(a * a, window) - mean_a * mean_a, smooth(b * b, window) - mean_b * mean_b
    covariance = smooth(a * b, window) - mean_a * mean_b
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    above = (2 * (mean_a * mean_b) + c1) * (2 * covariance + c2)
    below = (mean_a * mean_a + mean_b * mean_b + c1) * (var_a + var_b + c2)
    similarity: NDArray[np.float64] = (above / below).mean(axis=(1, 2, 3))
    return similarity


def window_size(side: int) -> int:
    """Return the window's side: 11, or the largest odd number up to `side`, the smaller side of the image."""
    return min(WINDOW, side - (side + 1) % 2)


def gaussian_window(size: int) -> NDArray[np.float64]:
    """Return exp(-d² / 2σ²) for distances d from the middle, σ = 1.5, normalised to a sum of 1, as (size,)."""
    distance = np.arange(size, dtype=np.float64) - size // 2
    weights = np.exp(-(distance**2) / (2 * SIGMA**2))
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised


def smooth(images: NDArray[np.float64], window: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return images (N, H, W, C) averaged under window ⊗ window, without padding: (N, H - w + 1, W - w + 1, C)."""
    for axis in (1, 2):
        ahead = np.moveaxis(images, axis, 0)
        fits = len(ahead) - len(window) + 1
        images = np.moveaxis(sum(weight * ahead[i : i + fits] for i, weight in enumerate(window)), 0, axis)
    return images
