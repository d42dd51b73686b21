"""Errors between images of the same seeds, which a change to the weights alone makes differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError

_IMAGES_AT_ONCE = 64


@dataclass(frozen=True)
class PairedError:
    """Error over all pixels of `n` pairs: `mse` in grey levels², `psnr` in dB, largest error in grey levels.

    `psnr` is None where the images are equal, since it is infinite there.
    """

    mse: float
    psnr: float | None
    max_abs: float
    n: int


def paired_error(a: NDArray[np.uint8], b: NDArray[np.uint8], grey_levels: int) -> PairedError:
    """Return MSE = mean (a - b)² on the scale 0..grey_levels, and PSNR = 10 log₁₀(grey_levels² / MSE).

    a and b are uint8 (N, H, W, C). The squares are summed as integers, so the result is exact whatever the order.
    Raises `BadInputError` for other arrays, and for differing shapes.
    """
    for name, images in (("first", a), ("second", b)):
        if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
            raise BadInputError(f"the {name} images are {images.dtype} {images.shape}; they must be uint8 (N, H, W, C)")
    if a.shape != b.shape:
        raise BadInputError(f"images of shape {a.shape} and {b.shape} cannot be paired; sample both with one spec")
    squares, largest = 0, 0
    for start in range(0, len(a), _IMAGES_AT_ONCE):
        stop = start + _IMAGES_AT_ONCE
        difference = a[start:stop].astype(np.int32) - b[start:stop].astype(np.int32)
        squares += int((difference * difference).sum(dtype=np.int64))
        largest = max(largest, int(np.abs(difference).max()))
    mse = squares * grey_levels**2 / (255**2 * a.size)
    psnr = 10 * math.log10(255**2 * a.size / squares) if squares else None
    return PairedError(mse, psnr, largest * grey_levels / 255, len(a))
