"""Images for other programs and for the eye: folders of PNG, ADM's npz, one picture of many."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import UsageError
from ditmoe_cli.evaluation.images import ImageSet
from ditmoe_cli.evaluation.mosaic import INNER, enlarged, mosaic, squarish
from ditmoe_cli.files.arrays import write_npz
from ditmoe_cli.files.staging import staged

DIGITS = 6
MOST_IN_GRID = 64

PNG_FILES = re.compile(rf"[0-9]{{{DIGITS},}}\.png")
_NOTHING = re.compile(r"(?!)")


def write_png_folder(
    folder: Path, images: NDArray[np.uint8], first: int = 0, force: bool = False, inputs: Iterable[Path] = ()
) -> int:
    """Write images uint8 (N, H, W, C), C 1 or 3, as ``000000.png`` and on, whole or not at all; return the bytes.

    Names count from `first`, with six digits, or as many as the last one takes, so that they sort in order. Grey images
    are of mode L. An empty folder is written into; one that holds such PNG is replaced, all of it, by `force` alone.

    Raises `OutputExistsError` where the folder holds anything else or is one of `inputs`, and `BadInputError` for other
    arrays.
    """
    from PIL import Image

    checked = ImageSet(images)
    digits = max(DIGITS, len(str(first + len(checked) - 1)))
    empty = folder.is_dir() and not any(folder.iterdir())
    # what appears meanwhile in an empty folder that nobody forced is not ours to replace
    contents = PNG_FILES if force or not empty else _NOTHING
    with staged(folder, force or empty, inputs, contents) as staging:
        staging.mkdir()
        for number, image in enumerate(checked.images, first):
            pixels = image[:, :, 0] if image.shape[2] == 1 else image
            Image.fromarray(pixels).save(staging / f"{number:0{digits}}.png", format="PNG")
        return sum(file.stat().st_size for file in staging.iterdir())


def write_adm_npz(
    path: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None = None,
    force: bool = False,
    inputs: Iterable[Path] = (),
) -> int:
    """Write images as the npz that ADM's evaluator reads, whole or not at all; return the bytes.

    ``arr_0`` is uint8 (N, H, W, 3), ``arr_1`` int64 (N,) where labels are known; nothing is compressed. Grey images are
    repeated to three equal channels, which that evaluator takes for granted (https://github.com/openai/guided-diffusion).

    Raises `OutputExistsError` where something is there and `force` is not given or it is one of `inputs`, and
    `BadInputError` for other arrays.
    """
    checked = ImageSet(images, labels)
    arrays = {"arr_0": images.repeat(3, axis=3) if images.shape[3] == 1 else images}
    if checked.labels is not None:
        arrays["arr_1"] = checked.labels.astype(np.int64)
    return write_npz(path, arrays, force, inputs)


def sample_grid(images: NDArray[np.uint8], columns: int | None = None, most: int = MOST_IN_GRID) -> NDArray[np.uint8]:
    """Return a picture (H', W', C) of the first `most` of images (N, H, W, C) in reading order; `write_png` writes it.

    There are `columns` in a row, at most as many as images; unless told as many as rows, or one more. Images are blown
    up by the smallest whole factor that makes each side at least 64 pixels.

    Raises `UsageError` where `columns` or `most` is below 1, and `BadInputError` for other arrays.
    """
    for name, value in (("columns", columns), ("most", most)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: a grid takes at least 1")
    shown = enlarged(ImageSet(images).images[:most])
    across = squarish(len(shown)) if columns is None else min(columns, len(shown))
    return mosaic(shown, across, INNER)
