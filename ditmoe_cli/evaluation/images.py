"""Image sets on disk: our safetensors, ADM's npz, folders of PNG; and telling them from other inputs.

Images are uint8 (N, H, W, C), C being 1 (grey) or 3 (RGB). Only lossless containers are read: storing samples
as JPEG changes FID (https://arxiv.org/abs/2104.11222).
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ditmoe_cli.errors import BadInputError, BrokenImageError
from ditmoe_cli.files.header import FileHeader, StoredTensor, TensorInfo, read_safetensors_header
from ditmoe_cli.files.provenance import canonical_json, check_schema
from ditmoe_cli.files.staging import staged
from ditmoe_cli.files.writer import write_safetensors

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

SAMPLES_SCHEMA = "ditmoe.samples/1"

Kind = Literal["images", "statistics", "checkpoint"]

_NUMPY_DTYPES: Mapping[str, str] = {"U8": "|u1", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8"}
_CODES: Mapping[str, str] = {dtype: code for code, dtype in _NUMPY_DTYPES.items()}
_OTHER_IMAGES = frozenset({".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jxl"})
_IMAGES = _OTHER_IMAGES | {".png"}
_CHECKPOINT_FILES = ("*.safetensors", "*.safetensors.index.json", "transformer/*.safetensors", "mp_rank_*")
# zipfile's RuntimeErrors are for encrypted members and for compression that it does not know.
_ARCHIVE_ERRORS = (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
_GREY_MODES = ("1", "L")
_DEEP_MODES = ("I", "F")  # I;16, I;16B and the like begin so too


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 (N, H, W, C) with C 1 or 3, and their class labels int64 (N,) where they are known.

    Raises `BadInputError` where the arrays are anything else.
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
            found = f"{self.labels.dtype.name} {self.labels.shape}"
            raise BadInputError(f"labels are {found}; they must be one integer for each of {shape[0]} images")

    def __len__(self) -> int:
        return len(self.images)


def kind_of(path: Path) -> Kind:
    """Tell by content what stands at `path`, reading no more than headers, without torch or numpy.

    What is neither images nor statistics is called a checkpoint, whose reader knows the many forms of those.
    Raises `BadInputError` where nothing stands there, or where a safetensors header is damaged.
    """
    if path.is_dir():
        return "images" if _is_image_folder(path) else "checkpoint"
    if not path.is_file():
        raise BadInputError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        names = set(read_safetensors_header(path).tensors)
        return _kind_of_arrays(names) or "checkpoint"
    names = _npz_names(path)
    if names or path.suffix == ".npz":
        return _kind_of_arrays(names) or "images"
    return "images" if path.suffix.lower() in _IMAGES else "checkpoint"


def _kind_of_arrays(names: set[str]) -> Kind | None:
    if {"mu", "sigma"} <= names:
        return "statistics"
    return "images" if "images" in names else None


def _npz_names(path: Path) -> set[str]:
    """Return the names of the arrays in a zip archive; a torch pickle, which is a zip too, has none."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except _ARCHIVE_ERRORS:
        return set()
    return {name.removesuffix(".npy") for name in members if name.endswith(".npy")}


def _is_image_folder(folder: Path) -> bool:
    if (folder / "latest").is_file() or any(any(folder.glob(pattern)) for pattern in _CHECKPOINT_FILES):
        return False
    return any(child.suffix.lower() in _IMAGES for child in folder.iterdir())


def read_images(path: Path) -> ImageSet:
    """Read the image set at `path`: safetensors of ours, an npz (`arr_0` or `images`), or a folder of PNG.

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
    # ADM's name for labels; but whatever was saved without a name is called so too
    if labels is None and second is not None and second.dtype.kind in "iu" and second.shape == images.shape[:1]:
        labels = second
    return images, labels


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts ``img_2.png`` before ``img_10.png``."""
    parts = re.split(r"([0-9]+)", name)
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts)


def _read_folder(folder: Path) -> ImageSet:
    """Read all PNG of a folder in natural order; grey ones become RGB where the folder holds both."""
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
            sizes = "{1}x{0}, but {3}x{2}".format(*image.shape[:2], *first.shape[:2])
            raise BadInputError(f"{file}: is {sizes} in {files[0].name}; all images must have one size")
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
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    seeds: Sequence[int] | NDArray[np.int64],
    metadata: Mapping[str, Any],
    force: bool = False,
    inputs: Iterable[Path] = (),
) -> int:
    """Write images, labels and the seed of each image as safetensors; equal content gives equal bytes.

    `metadata` goes in as JSON under ``ditmoe``, with the schema added. Returns the size of the file.
    """
    import numpy as np

    checked = ImageSet(images, labels)
    seed = np.asarray(seeds, dtype=np.int64)
    if seed.shape != (len(checked),):
        raise BadInputError(f"{path}: {seed.size} seeds for {len(checked)} images; each image needs one")
    arrays: dict[str, NDArray[Any]] = {"images": images, "seed": seed}
    if labels is not None:
        arrays["labels"] = np.asarray(labels, dtype=np.int64)
    return write_arrays(path, arrays, {**metadata, "schema": SAMPLES_SCHEMA}, force, inputs)


def to_uint8(pixels: torch.Tensor) -> NDArray[np.uint8]:
    """Turn pixels (N, C, H, W) in [-1, 1] into uint8 (N, H, W, C): clamp, (v + 1) · 127.5, round.

    Raises `BrokenImageError` for NaN, which would become an arbitrary pixel unseen.
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


def map_tensor(stored: StoredTensor) -> NDArray[Any]:
    """Return a tensor of a safetensors file as a read-only array that maps the file."""
    import numpy as np

    info = stored.info
    if info.dtype not in _NUMPY_DTYPES:
        raise BadInputError(f"{stored.path}: {info.name!r} has dtype {info.dtype}, none of {', '.join(_NUMPY_DTYPES)}")
    dtype = np.dtype(_NUMPY_DTYPES[info.dtype])
    if not info.numel:
        return np.empty(info.shape, dtype)
    flat = np.memmap(stored.path, dtype, "r", offset=stored.start, shape=(info.numel,))
    return np.asarray(flat).reshape(info.shape)


def read_npz(path: Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Return those arrays of `names` that the npz at `path` holds; pickled objects are refused."""
    import numpy as np

    if not zipfile.is_zipfile(path):
        raise BadInputError(f"{path}: not an npz archive, or cut short; fetch it again or save it with np.savez")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names if name in archive.files}
    except _ARCHIVE_ERRORS as error:
        raise BadInputError(f"{path}: cannot be read as npz ({first_line(error)}); fetch it again") from None


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Return those arrays of `names` that the safetensors file at `path` holds, mapped read-only."""
    tensors = read_safetensors_header(path).tensors
    return {name: map_tensor(tensors[name]) for name in names if name in tensors}


def read_document(header: FileHeader, schema: str, path: Path) -> dict[str, Any] | None:
    """Return the JSON under ``ditmoe`` in a file's metadata, checked against `schema`; None where there is none."""
    text = header.metadata.get("ditmoe")
    if text is None:
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path}: the ditmoe metadata is not JSON ({first_line(error)})") from None
    return check_schema(document, schema, f"{path}: ditmoe metadata")


def write_arrays(
    path: Path,
    arrays: Mapping[str, NDArray[Any]],
    document: Mapping[str, Any],
    force: bool = False,
    inputs: Iterable[Path] = (),
) -> int:
    """Write arrays as safetensors, whole or not at all, with `document` under ``ditmoe``; return the size."""
    import numpy as np

    ordered = {name: np.asarray(arrays[name]) for name in sorted(arrays)}
    infos = [TensorInfo(name, _CODES[array.dtype.str], array.shape) for name, array in ordered.items()]
    metadata = {"format": "pt", "ditmoe": canonical_json(document)}
    with staged(path, force, inputs) as staging:
        return write_safetensors(
            staging,
            infos,
            lambda info: ordered[info.name].reshape(-1).view(np.uint8).data,
            lambda _: metadata,
        )


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]], force: bool = False, inputs: Iterable[Path] = ()) -> int:
    """Write arrays as an uncompressed npz, whole or not at all; return the size."""
    import numpy as np

    with staged(path, force, inputs) as staging:
        with staging.open("wb") as file:
            np.savez(file, allow_pickle=False, **dict(arrays))
        return staging.stat().st_size


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened, for use inside one of ours."""
    lines = str(error).splitlines()
    return lines[0][:160] if lines and lines[0] else type(error).__name__
