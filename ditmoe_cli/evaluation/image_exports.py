"""Images as other programs read them: folders of PNG and ADM's npz."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.images import ImageSet
from ditmoe_cli.files.arrays import read_npz, write_npz
from ditmoe_cli.files.staging import staged
from ditmoe_cli.progress import each, phase

DIGITS = 6

PNG_FILES = re.compile(rf"[0-9]{{{DIGITS},}}\.png")
_NO_FILES = re.compile(r"(?!)")


def write_png_folder(folder: Path, images: NDArray[np.uint8], force: bool = False, inputs: Iterable[Path] = ()) -> int:
    """Write images uint8 (N, H, W, C), C 1 or 3, as ``000000.png`` and on, whole or not at all; return the bytes.

    Names have six digits, or as many as the last one takes, so that they sort in order. Grey images have mode L. An
    empty folder is filled; a folder of such PNG is replaced as a whole, with `force` only.

    Raises `OutputExistsError` where the folder holds anything else or is one of `inputs`, and `BadInputError` for other
    arrays.
    """
    from PIL import Image

    checked = ImageSet(images)
    digits = max(DIGITS, len(str(len(checked) - 1)))
    empty = folder.is_dir() and not any(folder.iterdir())
    # without force, files that another process puts into the empty folder meanwhile are not replaced
    contents = PNG_FILES if force or not empty else _NO_FILES
    with staged(folder, force or empty, inputs, contents) as staging:
        staging.mkdir()
        for number, image in enumerate(each(checked.images, f"writing {folder.name}", "images")):
            pixels = image[:, :, 0] if image.shape[2] == 1 else image
            Image.fromarray(pixels).save(staging / f"{number:0{digits}}.png", format="PNG")
        return sum(file.stat().st_size for file in staging.iterdir())


def holds_pngs(folder: Path, images: NDArray[np.uint8]) -> bool:
    """Return whether a folder holds these images uint8 (N, H, W, C) as `write_png_folder` writes them, and no more."""
    from PIL import Image

    if not folder.is_dir() or folder.is_symlink():
        return False
    files = sorted(folder.iterdir())
    digits = max(DIGITS, len(str(len(images) - 1)))
    if [file.name for file in files] != [f"{number:0{digits}}.png" for number in range(len(images))]:
        return False
    for file, image in zip(each(files, f"comparing {folder.name}", "images"), images, strict=True):
        try:
            with Image.open(file, formats=["PNG"]) as opened:
                pixels = np.asarray(opened)
        except (OSError, SyntaxError, ValueError):
            return False
        if not np.array_equal(pixels, image[:, :, 0] if image.shape[2] == 1 else image):
            return False
    return True


def holds_adm_npz(path: Path, image_set: ImageSet) -> bool:
    """Return whether a file holds these images as `write_adm_npz` writes them."""
    try:
        arrays = read_npz(path, ("arr_0", "arr_1")) if path.is_file() and not path.is_symlink() else {}
    except BadInputError:
        return False
    images, labels = image_set.images, image_set.labels
    pixels = images.repeat(3, axis=3) if images.shape[3] == 1 else images
    held = arrays.get("arr_1")
    same_labels = held is None if labels is None else held is not None and np.array_equal(held, labels)
    return same_labels and "arr_0" in arrays and np.array_equal(arrays["arr_0"], pixels)


def write_adm_npz(
    path: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None = None,
    force: bool = False,
    inputs: Iterable[Path] = (),
) -> int:
    """Write images as the npz that ADM's evaluator reads, whole or not at all; return the bytes.

    ``arr_0`` is uint8 (N, H, W, 3), ``arr_1`` int64 (N,) where labels are known; nothing is compressed. Grey images are
    repeated to three equal channels, which that evaluator requires (https://github.com/openai/guided-diffusion).

    Raises `OutputExistsError` where the file exists without `force` or is one of `inputs`, and `BadInputError` for
    other arrays.
    """
    checked = ImageSet(images, labels)
    arrays = {"arr_0": images.repeat(3, axis=3) if images.shape[3] == 1 else images}
    if checked.labels is not None:
        arrays["arr_1"] = checked.labels.astype(np.int64)
    with phase(f"writing {path.name}"):
        return write_npz(path, arrays, force, inputs)
