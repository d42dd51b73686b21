"""Image sets on disk: our safetensors, ADM's npz, folders of PNG; and whether a path holds images at all.

Images are uint8 (N, H, W, C), C being 1 (grey) or 3 (RGB). Only lossless containers are read, since storing samples
as JPEG changes FID (https://arxiv.org/abs/2104.11222).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ditmoe_cli.errors import BadInputError, BrokenImageError, first_line
from ditmoe_cli.files.arrays import map_tensor, npz_names, read_document, read_npz, write_arrays
from ditmoe_cli.files.header import read_safetensors_header

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

SAMPLES_SCHEMA = "ditmoe.samples/1"

Kind = Literal["images", "statistics", "checkpoint"]

_OTHER_IMAGES = frozenset({".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jxl"})
_IMAGES = _OTHER_IMAGES | {".png"}
_CHECKPOINT_FILES = ("*.safetensors", "*.safetensors.index.json", "transformer/*.safetensors", "mp_rank_*")
_GREY_MODES = ("1", "L")
_DEEP_MODES = ("I", "F")  # also how I;16 and I;16B begin


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 (N, H, W, C) with C 1 or 3, and their class labels int64 (N,) where these are known.

    Raises `BadInputError` for arrays of another dtype or shape.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        shape, dtype = self.images.shape, self.images.dtype
        if dtype.name != "uint8":
            raise BadInputError(f"images have dtype {dtype.name}; they must be uint8 in 0..255")
        if len(shape) != 4 or shape[3] not in (1, 3):
            raise BadInputError(f"images have shape {shape}; it must be (N, H, W, C) with C 1 or 3")
        if 0 in shape:
            raise BadInputError(f"images have shape {shape}, which holds no pixel")
        if self.labels is not None and (self.labels.shape != shape[:1] or self.labels.dtype.kind not in "iu"):
            raise BadInputError(
                f"labels are {self.labels.dtype.name} {self.labels.shape}; "
                f"they must be one integer for each of {shape[0]} images"
            )

    def __len__(self) -> int:
        return len(self.images)


def kind_of(path: Path) -> Kind:
    """Return the kind of input at `path`, from headers alone, without torch or numpy.

    Anything but images and statistics counts as a checkpoint: its reader knows the many forms of those.
    Raises `BadInputError` where the path does not exist, or where a safetensors header is damaged.
    """
    if path.is_dir():
        return "images" if _is_image_folder(path) else "checkpoint"
    if not path.is_file():
        raise BadInputError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        names = set(read_safetensors_header(path).tensors)
        return _kind_of_arrays(names) or "checkpoint"
    names = npz_names(path)
    if names or path.suffix == ".npz":
        return _kind_of_arrays(names) or "images"
    return "images" if path.suffix.lower() in _IMAGES else "checkpoint"


def _kind_of_arrays(names: set[str]) -> Kind | None:
    if {"mu", "sigma"} <= names:
        return "statistics"
    return "images" if "images" in names else None


def _is_image_folder(folder: Path) -> bool:
    if (folder / "latest").is_file() or any(any(folder.glob(pattern)) for pattern in _CHECKPOINT_FILES):
        return False
    return any(child.suffix.lower() in _IMAGES for child in folder.iterdir())


def read_images(path: Path) -> ImageSet:
    """Read the image set at `path`: our safetensors, an npz (`arr_0` or `images`), or a folder of PNG.

    Labels of an npz are `labels`, or `arr_1` where it holds one integer for each image. Safetensors are memory-mapped.
    Raises `BadInputError`, which names the file.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise BadInputError(f"{path}: no such file or folder")
    if path.suffix.lower() in _IMAGES:
        raise BadInputError(f"{path}: is a single image; give the folder that holds all of them, as PNG")
    images, labels = _read_safetensors(path) if path.suffix == ".safetensors" else _read_npz(path)
    return _image_set(path, images, labels)


def _image_set(path: Path, images: NDArray[Any], labels: NDArray[Any] | None) -> ImageSet:
    try:
        checked = ImageSet(images, labels)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from None
    return checked if labels is None else ImageSet(checked.images, labels.astype("int64"))


def _read_safetensors(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    header = read_safetensors_header(path)
    if "images" not in header.tensors:
        raise BadInputError(f"{path}: has no tensor 'images'; give samples, as `ditmoe sample` writes them")
    read_document(header, SAMPLES_SCHEMA, path)
    labels = header.tensors.get("labels")
    return map_tensor(header.tensors["images"]), None if labels is None else map_tensor(labels)


def _read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    arrays = read_npz(path, ("arr_0", "arr_1", "images", "labels"))
    images, labels, second = arrays.get("arr_0", arrays.get("images")), arrays.get("labels"), arrays.get("arr_1")
    if images is None:
        raise BadInputError(f"{path}: has neither an array 'arr_0' nor 'images'; name an npz of images")
    # ADM names labels so, but numpy does the same with any second array that was saved without a name
    if labels is None and second is not None and second.dtype.kind in "iu" and second.shape == images.shape[:1]:
        labels = second
    return images, labels


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts ``img_2.png`` before ``img_10.png``."""
    parts = re.split(r"([0-9]+)", name)
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts)


def _read_folder(folder: Path) -> ImageSet:
    """Read all PNG of a folder in natural order; grey ones are repeated to RGB where the folder holds both."""
    import numpy as np

    visible = [child for child in folder.iterdir() if not child.name.startswith(".")]
    other = min((c.name for c in visible if c.suffix.lower() in _OTHER_IMAGES), default=None)
    if other is not None:
        raise BadInputError(
            f"{folder / other}: only PNG is read, for storing images as JPEG or resampled changes FID; "
            "save the originals as PNG"
        )
    pngs = (child for child in visible if child.suffix.lower() == ".png")
    files = sorted(pngs, key=lambda child: _natural(child.name))
    if not files:
        raise BadInputError(f"{folder}: holds no PNG images")
    first = _read_png(files[0])
    images = np.empty((len(files), *first.shape), dtype=np.uint8)
    for index, file in enumerate(files):
        image = _read_png(file)
        if image.shape[:2] != first.shape[:2]:
            size, expected = (f"{width}x{height}" for height, width, _ in (image.shape, first.shape))
            raise BadInputError(f"{file}: is {size}, but {expected} in {files[0].name}; all images must have one size")
        if image.shape[2] > images.shape[3]:
            images = np.repeat(images, 3, axis=3)
        images[index] = image
    return ImageSet(images)


def _read_png(file: Path) -> NDArray[np.uint8]:
    """Return one PNG as (H, W, 1) where it is grey, else as (H, W, 3)."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as image:
            if image.mode.startswith(_DEEP_MODES):
                raise BadInputError(f"{file}: has more than 8 bits a channel (mode {image.mode}); save it as 8-bit")
            grey = image.mode in _GREY_MODES
            pixels = np.asarray(image.convert("L" if grey else "RGB"), dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInputError(f"{file}: cannot be read as PNG ({first_line(error)})") from None
    return pixels[:, :, None] if grey else pixels


def write_images(
    path: Path,
    image_set: ImageSet,
    seeds: Sequence[int] | NDArray[np.int64],
    metadata: Mapping[str, Any],
    force: bool = False,
    inputs: Iterable[Path] = (),
) -> int:
    """Write images, labels and the seed of each image as safetensors; return the bytes. Equal content, equal bytes.

    `metadata` and the schema are stored as JSON under ``ditmoe``. Raises `BadInputError` unless there is one seed for
    each image.
    """
    import numpy as np

    seed = np.asarray(seeds, dtype=np.int64)
    if seed.shape != (len(image_set),):
        raise BadInputError(f"{path}: {seed.size} seeds for {len(image_set)} images; each image needs one")
    arrays: dict[str, NDArray[Any]] = {"images": image_set.images, "seed": seed}
    if image_set.labels is not None:
        arrays["labels"] = np.asarray(image_set.labels, dtype=np.int64)
    return write_arrays(path, arrays, {**metadata, "schema": SAMPLES_SCHEMA}, force, inputs)


def to_uint8(pixels: torch.Tensor) -> NDArray[np.uint8]:
    """Return pixels (N, C, H, W) in [-1, 1] as uint8 (N, H, W, C): clamp, (v + 1) · 127.5, round.

    Raises `BrokenImageError` for NaN, which would silently become an arbitrary pixel.
    """
    import torch

    values = pixels.detach().float()
    broken = values.isnan().flatten(1).any(dim=1)
    if bool(broken.any()):
        first = int(broken.nonzero()[0])
        raise BrokenImageError(first, "NaN; is the checkpoint whole, the precision enough?")
    levels = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    array: NDArray[np.uint8] = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array
