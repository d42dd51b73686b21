"""Image sets on disk: our safetensors, ADM's npz, folders and zip archives; and whether a path holds images at all.

Images are uint8 (N, H, W, C), C being 1 (grey) or 3 (RGB). Inputs are told apart by their content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ditmoe_cli.errors import BadInputError, BrokenImageError
from ditmoe_cli.evaluation.features.statistics_spelling import are_statistics
from ditmoe_cli.evaluation.image_files import format_of, head_of, holds_images, list_images, read_files
from ditmoe_cli.files.arrays import map_tensor, npz_names, npz_shapes, read_document, read_npz, write_arrays
from ditmoe_cli.files.fingerprint import file_digest
from ditmoe_cli.files.header import is_safetensors, read_safetensors_header

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

SAMPLES_SCHEMA = "ditmoe.samples/1"

Kind = Literal["images", "statistics", "checkpoint"]

_CHECKPOINT_FILES = ("*.safetensors", "*.safetensors.index.json", "transformer/*.safetensors", "mp_rank_*")
_IMAGES, _LABELS = ("arr_0", "images"), ("labels", "label", "y", "classes")


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
    """Return the kind of input at `path`, from its first bytes and headers alone, without torch or numpy.

    Anything but images and statistics counts as a checkpoint: its reader knows the many forms of those.
    Raises `BadInputError` where the path does not exist or holds latents, or where a safetensors header is damaged.
    """
    if path.is_dir():
        return "images" if _is_image_folder(path) else "checkpoint"
    if not path.is_file():
        raise BadInputError(f"{path}: no such file or folder")
    names = npz_names(path)
    if names or path.suffix == ".npz":
        return "statistics" if are_statistics(names) else "images"
    if format_of(head_of(path)) is not None or holds_images(path):
        return "images"
    if not is_safetensors(path) and path.suffix != ".safetensors":
        return "checkpoint"
    tensors = set(read_safetensors_header(path).tensors)
    if "latents" in tensors:
        raise BadInputError(f"{path}: holds latents, not images; sample the checkpoint with ⟨vae⟩, which decodes them")
    return "statistics" if are_statistics(tensors) else "images" if "images" in tensors else "checkpoint"


def _is_image_folder(folder: Path) -> bool:
    if (folder / "latest").is_file() or any(any(folder.glob(pattern)) for pattern in _CHECKPOINT_FILES):
        return False
    return holds_images(folder)


def images_digest(path: Path) -> str:
    """Return the SHA-256 of an image set's file; of a folder, over the names and contents of its images."""
    return list_images(path).digest if path.is_dir() else file_digest(path)


def read_images(path: Path, notify: Callable[[str], None] = lambda _: None) -> ImageSet:
    """Read the image set at `path`: our safetensors, an npz, a folder of images at any depth, or a zip of them.

    In an npz images are `arr_0`, `images` or the only array uint8 (N, H, W, C); labels are `labels`, or `arr_1` where
    it holds one integer for each image. In folders labels are those of `Listing.labels`. Safetensors are memory-mapped.
    `notify` takes what a folder has beside images. Raises `BadInputError`, which names the file.
    """
    if path.is_dir():
        return _read_folder(path, notify)
    if not path.is_file():
        raise BadInputError(f"{path}: no such file or folder")
    if is_safetensors(path):
        return _image_set(path, *_read_safetensors(path))
    if format_of(head_of(path)) is not None:
        raise BadInputError(f"{path}: is a single image; give the folder that holds all of them")
    if holds_images(path):
        return _read_folder(path, notify)
    if npz_names(path) or path.suffix != ".safetensors":
        return _image_set(path, *_read_npz(path))
    return _image_set(path, *_read_safetensors(path))


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
    shapes = npz_shapes(path)
    image_like = [name for name, (dtype, shape) in shapes.items() if dtype == "uint8" and len(shape) == 4]
    name = next((name for name in _IMAGES if name in shapes), image_like[0] if len(image_like) == 1 else None)
    if name is None:
        held = ", ".join(sorted(shapes)) or "nothing"
        raise BadInputError(f"{path}: has neither an array 'arr_0' nor 'images', but {held}; name an npz of images")
    arrays = read_npz(path, (name, "arr_1", *_LABELS))
    images, second = arrays[name], arrays.get("arr_1")
    labels = next((arrays[label] for label in _LABELS if label in arrays), None)
    # ADM names labels so, but numpy does the same with any second array that was saved without a name
    if labels is None and second is not None and second.dtype.kind in "iu" and second.shape == images.shape[:1]:
        labels = second
    return images, labels


def _read_folder(root: Path, notify: Callable[[str], None]) -> ImageSet:
    """Read all images of a folder or zip archive in natural order."""
    import numpy as np

    listing = list_images(root)
    if listing.left_out:
        count, first = len(listing.left_out), listing.left_out[0]
        what = (
            f"1 other file, {first}, which is no image"
            if count == 1
            else (f"{count} other files, which are no images, such as {first}")
        )
        notify(f"{root}: leaving out {what}")
    read, labels = read_files(listing), listing.labels()
    if labels is None and any("/" in name for name in listing.names):
        notify(f"{root}: read with all its folders; their names are no class numbers, so the images have no labels")
    if read.jpeg:
        notify(
            f"{root}: {len(read.jpeg)} of {len(listing.names)} images are JPEG; storing images so changes FID "
            "(https://arxiv.org/abs/2104.11222)"
        )
    return ImageSet(read.images, None if labels is None else np.asarray(labels, dtype=np.int64))


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
