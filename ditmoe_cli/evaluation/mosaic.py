"""Many images in one picture: pairs side by side, and the mosaic that all such pictures are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.staging import staged

MOST_PAIRS = 64
SMALLEST_SIDE = 64
INNER, OUTER = 4, 12  # white pixels within a pair, and around it
_WHITE = 255


def enlarged(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return images (N, H, W, C) blown up by the smallest whole factor that makes each side at least 64 pixels."""
    factor = math.ceil(SMALLEST_SIDE / min(images.shape[1:3]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def pair_grid(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture (H', W', C) of the first 64 pairs of a and b (N, H, W, C): a left, b right, in reading order.

    There are as many pairs in a row as rows, or one more. Raises `BadInputError` where the shapes differ or are empty.
    """
    if a.shape != b.shape or a.ndim != 4 or not a.size:
        raise BadInputError(f"images of shape {a.shape} and {b.shape} make no pairs; they must be equal (N, H, W, C)")
    a, b = enlarged(a[:MOST_PAIRS]), enlarged(b[:MOST_PAIRS])
    between = np.full((*a.shape[:2], INNER, a.shape[3]), _WHITE, dtype=np.uint8)
    return mosaic(np.concatenate([a, between, b], axis=2), squarish(len(a)), OUTER)


def squarish(count: int) -> int:
    """Return the columns that `count` cells take in as many rows, or one row less."""
    return math.ceil(math.sqrt(count))


def mosaic(cells: NDArray[np.uint8], across: int, margin: int) -> NDArray[np.uint8]:
    """Return a picture (H', W', C) of cells (N, H, W, C) in reading order, `across` to a row, white around each."""
    count, height, width, channels = cells.shape
    down = math.ceil(count / across)
    step_down, step_across = height + margin, width + margin
    picture = np.full((down * step_down + margin, across * step_across + margin, channels), _WHITE, dtype=np.uint8)
    for index, cell in enumerate(cells):
        top, left = margin + index // across * step_down, margin + index % across * step_across
        picture[top : top + height, left : left + width] = cell
    return picture


def write_png(path: Path, picture: NDArray[np.uint8], force: bool = False, inputs: Iterable[Path] = ()) -> int:
    """Write a picture (H, W, C), C 1 or 3, as PNG, whole or not at all; return the bytes."""
    from PIL import Image

    image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    with staged(path, force, inputs) as staging:
        image.save(staging, format="PNG")
        return staging.stat().st_size
