"""Grids of images in one PNG: samples in reading order, and pairs side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.images import ImageSet
from ditmoe_cli.files.staging import staged

MOST_IN_GRID = 64
MOST_PAIRS = 64
SMALLEST_SIDE = 64
INNER, OUTER = 4, 14  # white pixels within a pair, and around it
STRIP, SIDE_STRIP = 16, 24  # white pixels for marks above images and on their left
MOST_COLUMNS = 16  # classes that make columns
_WHITE, _INK = 255, 60


@dataclass(frozen=True)
class Mark:
    """A short text to draw, by the pixels (x, y) of its middle."""

    text: str
    x: float
    y: float


def sample_grid(
    images: NDArray[np.uint8], labels: Sequence[int] | NDArray[np.int64] | None = None
) -> NDArray[np.uint8]:
    """Return a grid (H', W', C) of the first 64 images uint8 (N, H, W, C), enlarged to at least 64 pixels a side.

    Without labels it has as many columns as rows, or one more. With the images' class labels it is marked: where these
    go through up to 16 classes in turn, each column is a class, named above it; else each image's class stands above
    it. Numbers on the left are those of the first images of the rows. Raises `BadInputError` for other arrays.
    """
    cells = enlarged(ImageSet(images).images[:MOST_IN_GRID])
    if labels is None:
        return tiled(cells, INNER)
    shown = [int(label) for label in labels[: len(cells)]]
    turn = next((size for size in range(1, MOST_COLUMNS + 1) if shown == _repeated(shown[:size], len(shown))), None)
    across = turn if turn is not None and turn > 1 and len(cells) > turn else math.ceil(math.sqrt(len(cells)))
    by_column = all(label == shown[index % across] for index, label in enumerate(shown))
    captions = INNER if by_column else STRIP
    height, width = cells.shape[1:3]
    if captions > INNER:  # room above each image
        room = np.full((len(cells), captions - INNER, *cells.shape[2:]), _WHITE, dtype=np.uint8)
        cells = np.concatenate([room, cells], axis=1)
    top = STRIP if by_column else 0
    picture = np.pad(tiled(cells, INNER, across), ((top, 0), (SIDE_STRIP, 0), (0, 0)), constant_values=_WHITE)
    step_down, step_across = cells.shape[1] + INNER, width + INNER
    middle = top + INNER + (captions - INNER) + height / 2
    marks = [
        Mark(str(index), SIDE_STRIP / 2, middle + index // across * step_down) for index in range(0, len(cells), across)
    ]
    for index, label in enumerate(shown[:across] if by_column else shown):
        x = SIDE_STRIP + INNER + width / 2 + index % across * step_across
        marks.append(Mark(str(label), x, STRIP / 2 + 2 + (0 if by_column else index // across * step_down)))
    return drawn(picture, marks)


def _repeated(labels: list[int], count: int) -> list[int]:
    return [labels[index % len(labels)] for index in range(count)]


def drawn(picture: NDArray[np.uint8], marks: Iterable[Mark]) -> NDArray[np.uint8]:
    """Return a picture (H, W, C), C 1 or 3, with texts in dark grey, in the font that Pillow brings."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    for mark in marks:
        left, top, right, bottom = draw.textbbox((0, 0), mark.text, font=font)
        place = round(mark.x - (left + right) / 2), round(mark.y - (top + bottom) / 2)
        draw.text(place, mark.text, fill=_INK if picture.shape[2] == 1 else (_INK,) * 3, font=font)
    return np.asarray(image).reshape(picture.shape)


def enlarged(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return images (N, H, W, C) repeated by the smallest whole factor that makes each side at least 64 pixels."""
    factor = math.ceil(SMALLEST_SIDE / min(images.shape[1:3]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def pair_grid(a: NDArray[np.uint8], b: NDArray[np.uint8], labels: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """Return a grid (H', W', C) of the first 64 pairs of a and b (N, H, W, C): a left, b right, in reading order.

    It has as many columns as rows, or one more. With the pairs' class labels, A and B stand above the images of each
    pair, and its class behind them. Raises `BadInputError` where the shapes differ or are empty.
    """
    if a.shape != b.shape or a.ndim != 4 or not a.size:
        raise BadInputError(f"images of shape {a.shape} and {b.shape} make no pairs; they must be equal (N, H, W, C)")
    a, b = enlarged(a[:MOST_PAIRS]), enlarged(b[:MOST_PAIRS])
    between = np.full((*a.shape[:2], INNER, a.shape[3]), _WHITE, dtype=np.uint8)
    cells = np.concatenate([a, between, b], axis=2)
    picture = tiled(cells, OUTER)
    if labels is None:
        return picture
    count, height, width = a.shape[:3]
    across = math.ceil(math.sqrt(count))
    marks = []
    for index in range(count):
        left = OUTER + index % across * (cells.shape[2] + OUTER)
        y = OUTER / 2 + index // across * (height + OUTER)
        marks += [
            Mark(f"{name} · {labels[index]}", left + width / 2 + side * (width + INNER), y)
            for side, name in enumerate("AB")
        ]
    return drawn(picture, marks)


def tiled(cells: NDArray[np.uint8], margin: int, across: int | None = None) -> NDArray[np.uint8]:
    """Return a grid (H', W', C) of cells (N, H, W, C) in reading order, with a white margin around each.

    It has `across` columns, by default as many as rows, or one more.
    """
    count, height, width, channels = cells.shape
    across = across or math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    step_down, step_across = height + margin, width + margin
    picture = np.full((down * step_down + margin, across * step_across + margin, channels), _WHITE, dtype=np.uint8)
    for index, cell in enumerate(cells):
        top, left = margin + index // across * step_down, margin + index % across * step_across
        picture[top : top + height, left : left + width] = cell
    return picture


def write_png(path: Path, picture: NDArray[np.uint8], force: bool = False, inputs: Iterable[Path] = ()) -> int:
    """Write a picture (H, W, C), C 1 or 3, as PNG, whole or not at all; return the bytes."""
    data = png_bytes(picture)
    with staged(path, force, inputs) as staging:
        return staging.write_bytes(data)


def png_bytes(picture: NDArray[np.uint8]) -> bytes:
    """Return a picture (H, W, C), C 1 or 3, as PNG."""
    from io import BytesIO

    from PIL import Image

    data = BytesIO()
    Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(data, format="PNG")
    return data.getvalue()


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
