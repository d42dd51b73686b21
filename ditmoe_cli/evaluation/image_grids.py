"""Grids of images in one PNG: samples in reading order, and pairs side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.images import ImageSet
from ditmoe_cli.files.staging import staged

MOST_IN_GRID = 64
MOST_PAIRS = 64
SMALLEST_SIDE = 64
INNER, OUTER = 4, 12  # white pixels within a pair, and around it
_WHITE = 255


def sample_grid(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a grid (H', W', C) of the first 64 images uint8 (N, H, W, C), enlarged to at least 64 pixels a side.

    It has as many columns as rows, or one more. Raises `BadInputError` for other arrays.
    """
    return tiled(enlarged(ImageSet(images).images[:MOST_IN_GRID]), INNER)


def enlarged(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return images (N, H, W, C) repeated by the smallest whole factor that makes each side at least 64 pixels."""
    factor = math.ceil(SMALLEST_SIDE / min(images.shape[1:3]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def pair_grid(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a grid (H', W', C) of the first 64 pairs of a and b (N, H, W, C): a left, b right, in reading order.

    It has as many columns as rows, or one more. Raises `BadInputError` where the shapes differ or are empty.
    """
    if a.shape != b.shape or a.ndim != 4 or not a.size:
        raise BadInputError(f"images of shape {a.shape} and {b.shape} make no pairs; they must be equal (N, H, W, C)")
    a, b = enlarged(a[:MOST_PAIRS]), enlarged(b[:MOST_PAIRS])
    between = np.full((*a.shape[:2], INNER, a.shape[3]), _WHITE, dtype=np.uint8)
    return tiled(np.concatenate([a, between, b], axis=2), OUTER)


def tiled(cells: NDArray[np.uint8], margin: int) -> NDArray[np.uint8]:
    """Return a grid (H', W', C) of cells (N, H, W, C) in reading order, with a white margin around each.

    It has as many columns as rows, or one more.
    """
    count, height, width, channels = cells.shape
    across = math.ceil(math.sqrt(count))
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


def holds_picture(path: Path, picture: NDArray[np.uint8]) -> bool:
    """Return whether a file holds a picture (H, W, C), C 1 or 3, as `write_png` writes it."""
    from PIL import Image

    if not path.is_file() or path.is_symlink():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            pixels = np.asarray(opened)
    except (OSError, SyntaxError, ValueError):
        return False
    return np.array_equal(pixels, picture[:, :, 0] if picture.shape[2] == 1 else picture)
