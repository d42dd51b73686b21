"""Image files in folders and zip archives: which there are, their class labels, and their pixels.

PNG, JPEG, WebP and BMP are read, told apart by their first bytes. A file whose pixels could be taken in more than one
way (transparent, animated, CMYK, more than 8 bits a channel) is refused by name.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from ditmoe_cli.errors import BadInputError, first_line
from ditmoe_cli.files.archives import ARCHIVE_ERRORS, check_expansion
from ditmoe_cli.files.arrays import disk_bytes
from ditmoe_cli.files.fingerprint import digest, file_digest
from ditmoe_cli.progress import each, phase

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_OTHER_ENDINGS = frozenset({".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic", ".jxl", ".jp2"})
_MOST_PIXELS = 2**25  # of one image
_HEAD = 32  # bytes in which every format shows
_PNG_DEPTH = 24  # place of the bits a channel in a PNG's first chunk
_CLUTTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})  # of Windows and of archives made on a Mac
_WEIGHTS = frozenset({".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".distcp"})
_GREY, _COLOUR = ("1", "L"), ("RGB", "P")
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_SYNSET = re.compile(r"n[0-9]{8}")
_CLASS_NUMBER = re.compile(r"[0-9]{1,9}")


def format_of(head: bytes) -> str | None:
    """Return the format of an image by its first bytes; None for other files."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and head[6:10] == bytes(4) and len(head) >= _PNG_DEPTH:
        return "BMP"
    if head[:4] in (b"II*\0", b"MM\0*"):
        return "TIFF"
    if head[:4] == b"GIF8":
        return "GIF"
    return "AVIF or HEIC" if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"mif1") else None


def head_of(file: Path) -> bytes:
    """Return the first bytes of a file; none where it cannot be read."""
    try:
        with file.open("rb") as opened:
            return opened.read(_HEAD)
    except OSError:
        return b""


def _head_of_entry(archive: zipfile.ZipFile, name: str, root: Path) -> bytes:
    """Return the first bytes of an archive's entry. Raises `BadInputError` where it cannot be read."""
    try:
        with archive.open(name) as entry:
            return entry.read(_HEAD)
    except ARCHIVE_ERRORS as error:
        raise BadInputError(f"{root / name}: cannot be read from its archive ({first_line(error)})") from None


@dataclass(frozen=True)
class Listing:
    """The images of a folder or a zip archive, by names relative to it, with ``/`` between folders.

    Attributes:
        root: the folder or archive.
        names: of the images, in natural order.
        left_out: of visible files that are no images.
    """

    root: Path
    names: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the archive, or over names and contents of the images."""
        if not self.root.is_dir():
            return file_digest(self.root)
        names = each(sorted(self.names), f"hashing {self.root.name}", "images")
        return digest([[name, file_digest(self.root / name)] for name in names])

    def labels(self) -> list[int] | None:
        """Return the label of each image by the folder that it lies in; None where folders are no classes.

        Folders are classes where every image lies in one whose name is a number, its label, or an ImageNet synset
        (``n01440764``), whose labels are their order.
        """
        folders = [PurePosixPath(name).parent.name for name in self.names]
        if folders and all(_CLASS_NUMBER.fullmatch(folder) for folder in folders):
            return [int(folder) for folder in folders]
        if folders and all(_SYNSET.fullmatch(folder) for folder in folders):
            order = {folder: label for label, folder in enumerate(sorted(set(folders)))}
            return [order[folder] for folder in folders]
        return None


def list_images(root: Path) -> Listing:
    """Return the images at any depth of a folder, or in a zip archive; hidden files and folders do not count.

    Raises `BadInputError` where there are none, or one is of a format that is not read.
    """
    images: list[str] = []
    left_out: list[str] = []
    with _opened(root) as archive, phase(f"listing {root.name}"):
        for name in _names(root, archive):
            ending = PurePosixPath(name).suffix.lower()
            head = _head_of_entry(archive, name, root) if archive else head_of(root / name)
            found = format_of(head)
            if found is None and ending not in _ENDINGS | _OTHER_ENDINGS:
                left_out.append(name)
                continue
            if found not in FORMATS and (found or ending in _OTHER_ENDINGS):
                raise BadInputError(
                    f"{root / name}: {found or ending[1:].upper()} is not read; save it as PNG, as it is"
                )
            images.append(name)
    if not images:
        others = f", only others such as {left_out[0]}" if left_out else ""
        raise BadInputError(f"{root}: holds no images (PNG, JPEG, WebP or BMP){others}")
    return Listing(root, tuple(sorted(images, key=_natural)), tuple(sorted(left_out, key=_natural)))


def holds_images(root: Path) -> bool:
    """Return whether a folder or a zip archive is one of images: it holds some, and no weights near its top."""
    if not root.is_dir():
        return zipfile.is_zipfile(root) and _archive_holds_images(root)
    if any(_is_image(file) for file in root.iterdir() if file.is_file() and _counts(file.name)):
        return True
    below = [file for pattern in ("*", "*/*") for file in root.glob(pattern)]
    if any(file.suffix in _WEIGHTS for file in below):
        return False
    return any(_is_image(root / name) for name in _names(root, None))


def _archive_holds_images(root: Path) -> bool:
    try:
        with zipfile.ZipFile(root) as archive:
            names = [name for name in archive.namelist() if _counts(PurePosixPath(name).name)]
    except ARCHIVE_ERRORS:
        return False
    if any(name.endswith(("data.pkl", ".npy")) for name in names):
        return False
    return any(PurePosixPath(name).suffix.lower() in _ENDINGS | _OTHER_ENDINGS for name in names)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _ENDINGS | _OTHER_ENDINGS or format_of(head_of(file)) is not None


def _counts(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _CLUTTER


def _names(root: Path, archive: zipfile.ZipFile | None) -> Iterator[str]:
    """Yield the names of visible files at any depth, links followed, each folder once."""
    if archive is not None:
        files = (name for name in archive.namelist() if not name.endswith("/"))
        yield from (name for name in files if all(map(_counts, PurePosixPath(name).parts)))
        return
    seen: set[str] = set()
    for folder, folders, files_here in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = [
            name for name in sorted(folders) if _counts(name) and os.path.realpath(Path(folder, name)) not in seen
        ]
        relative = PurePosixPath(Path(folder).relative_to(root).as_posix())
        yield from (str(relative / name) for name in files_here if _counts(name))


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts ``img_2.png`` before ``img_10.png``."""
    parts = re.split(r"([0-9]+)", name)
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts)


@contextmanager
def _opened(root: Path) -> Iterator[zipfile.ZipFile | None]:
    """Yield the open archive at `root`; None for a folder. Raises `BadInputError` where it is damaged."""
    if root.is_dir():
        yield None
        return
    try:
        with zipfile.ZipFile(root) as archive:
            yield archive
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise BadInputError(f"{root}: cannot be read as zip ({first_line(error)}); fetch it again") from None


@dataclass(frozen=True)
class ReadFiles:
    """Images uint8 (N, H, W, C), and the names of those that are stored as JPEG."""

    images: NDArray[np.uint8]
    jpeg: tuple[str, ...]


def read_files(listing: Listing) -> ReadFiles:
    """Return all images of a listing; grey ones are repeated to RGB where there are both.

    Raises `BadInputError`, which names the file, for one that cannot be read, or differs in size from the first.
    """
    import numpy as np

    root, names, jpeg = listing.root, listing.names, []
    images: NDArray[np.uint8] | None = None
    with _opened(root) as archive:
        for index, name in enumerate(each(names, f"reading {root.name}", "images")):
            try:
                with archive.open(name) if archive else (root / name).open("rb") as file:
                    pixels, kind = _read(file, root / name)
            except FileNotFoundError:  # a link that leads nowhere
                raise BadInputError(
                    f"{root / name}: no such file; it is a link that leads nowhere, remove it"
                ) from None
            if kind == "JPEG":
                jpeg.append(name)
            if images is None:
                check_expansion(root, len(names) * pixels.nbytes, disk_bytes(root))
                images = np.empty((len(names), *pixels.shape), dtype=np.uint8)
            if pixels.shape[:2] != images.shape[1:3]:
                size, expected = (f"{shape[1]}x{shape[0]}" for shape in (pixels.shape, images.shape[1:3]))
                raise BadInputError(
                    f"{root / name}: is {size}, but {expected} in {names[0]}; all images must have one size"
                )
            if pixels.shape[2] > images.shape[3]:
                images = np.repeat(images, 3, axis=3)
            images[index] = pixels
    assert images is not None
    return ReadFiles(images, tuple(jpeg))


def _read(file: IO[bytes], path: Path) -> tuple[NDArray[np.uint8], str]:
    """Return one image as (H, W, 1) where it is grey, else as (H, W, 3), turned as its EXIF tells, and its format."""
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file, formats=FORMATS) as image:
            _check(image, file, path)
            if image.width * image.height > _MOST_PIXELS:
                raise BadInputError(f"{path}: has {image.width} x {image.height} pixels; no model makes so many")
            upright = ImageOps.exif_transpose(image)
            grey = upright.mode in (*_GREY, "LA", "La")
            pixels = np.asarray(_opaque(upright, path).convert("L" if grey else "RGB"), dtype=np.uint8)
            return pixels[:, :, None] if grey else pixels, image.format or ""
    except UnidentifiedImageError:
        raise BadInputError(
            f"{path}: cannot be read as an image (it is empty, or none of {', '.join(FORMATS)}); "
            "fetch it again or remove it"
        ) from None
    except (*ARCHIVE_ERRORS, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInputError(f"{path}: cannot be read as an image ({first_line(error)})") from None


def _check(image: Image, file: IO[bytes], path: Path) -> None:
    """Raise `BadInputError` for pixels that 8-bit grey or RGB does not hold."""
    place = file.tell()
    file.seek(0)
    deep = image.format == "PNG" and file.read(_HEAD)[_PNG_DEPTH] == 16
    file.seek(place)
    if deep or image.mode.startswith(("I", "F")):
        raise BadInputError(f"{path}: has more than 8 bits a channel (mode {image.mode}); save it as 8-bit")
    if getattr(image, "n_frames", 1) > 1:
        raise BadInputError(f"{path}: is animated; save each of its {getattr(image, 'n_frames', 1)} frames as an image")
    if image.mode not in (*_GREY, *_COLOUR, *_WITH_ALPHA):
        raise BadInputError(f"{path}: has colours of mode {image.mode}; save it as RGB or grey")


def _opaque(image: Image, path: Path) -> Image:
    """Return an image without alpha. Raises `BadInputError` where pixels are transparent."""
    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return image
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    if lowest != 255:
        raise BadInputError(f"{path}: has transparent pixels; save it on the background that it should have")
    return image
