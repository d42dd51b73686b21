"""The kind of a file, told by its first bytes, whatever it is called."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ditmoe_cli.errors import BadInputError

Kind = Literal["safetensors", "pickle"]

_PICKLES = (b"PK", b"\x80", b"(")  # zip archives of torch, pickles of protocol 2 and above, and of protocol 0
_OTHERS: Mapping[bytes, str] = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself; fetch it with git lfs pull",
    b"<": "a web page or XML, not a checkpoint; the download failed, fetch it again",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"GGUF": "a GGUF file, which ditmoe does not read",
    b"\x89HDF": "an HDF5 file, which ditmoe does not read",
    b"\x93NUMPY": "a numpy array, not a checkpoint; save images with np.savez as an npz",
    b"\x89PNG": "a PNG image, not a checkpoint",
    b"\xff\xd8\xff": "a JPEG image, not a checkpoint",
    b"%PDF": "a PDF document, not a checkpoint",
    b"{": "JSON, not weights; name the folder or the index of its shards instead",
}
_HEADER_START = 8  # where the JSON of a safetensors header begins
_TAR = slice(257, 262)


def kind_of_file(path: Path) -> Kind:
    """Return the kind of a checkpoint's file. Raises `BadInputError`, saying what it is, for files of other kinds."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except PermissionError:
        raise BadInputError(f"{path}: permission denied") from None
    if not start:
        raise BadInputError(f"{path}: is empty; fetch it again")
    if not any(start):
        raise BadInputError(f"{path}: begins with zeros, as downloads do that were broken off; fetch it again")
    if start[_HEADER_START : _HEADER_START + 1] == b"{" and start[4:_HEADER_START] == bytes(4):
        return "safetensors"
    if start[_TAR] == b"ustar":
        raise BadInputError(f"{path}: is a tar archive; unpack it first")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    other = next((what for magic, what in _OTHERS.items() if start.startswith(magic) or text.startswith(magic)), None)
    if other is not None:
        raise BadInputError(f"{path}: is {other}")
    if start.startswith(b"PK"):
        _refuse_other_archives(path)
    if start.startswith(_PICKLES):
        return "pickle"
    return "safetensors" if path.suffix == ".safetensors" else "pickle"  # whose reader says what is wrong


def _refuse_other_archives(path: Path) -> None:
    """Raise `BadInputError` for a zip archive that is not torch's, or is cut short."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
        raise BadInputError(f"{path}: is a zip archive, as torch writes, that was cut short; fetch it again") from None
    if any(name.endswith(".npy") for name in names):
        raise BadInputError(f"{path}: is a numpy archive (npz), not a checkpoint")
    if any("/code/" in name for name in names):
        raise BadInputError(f"{path}: is a TorchScript archive; save the module's state_dict() instead")
    if not any(name.endswith("data.pkl") for name in names):
        raise BadInputError(f"{path}: is a zip archive that torch did not write; unpack it first")
