"""Named arrays in safetensors and npz files; those of safetensors are mapped, not copied."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_cli.errors import BadInputError, first_line
from ditmoe_cli.files.archives import ARCHIVE_ERRORS, check_expansion
from ditmoe_cli.files.fingerprint import canonical_json
from ditmoe_cli.files.header import FileHeader, StoredTensor, TensorInfo, read_safetensors_header
from ditmoe_cli.files.json_text import parse_json
from ditmoe_cli.files.provenance import check_schema
from ditmoe_cli.files.staging import staged
from ditmoe_cli.files.writer import write_safetensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NUMPY_DTYPES: Mapping[str, str] = {"U8": "|u1", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8"}
_CODES: Mapping[str, str] = {dtype: code for code, dtype in _NUMPY_DTYPES.items()}


def npz_names(path: Path) -> set[str]:
    """Return the names of the arrays in an npz; none for other files, torch's zipped pickles included."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except ARCHIVE_ERRORS:
        return set()
    return {name.removesuffix(".npy") for name in members if name.endswith(".npy")}


def disk_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder at any depth."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def npz_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each array in an npz, from their headers. Raises `BadInputError` for damaged files."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
            check_expansion(path, sum(entry.file_size for entry in entries), disk_bytes(path))
            return {entry.filename.removesuffix(".npy"): _npy_shape(archive, entry) for entry in entries}
    except ARCHIVE_ERRORS as error:
        raise BadInputError(f"{path}: cannot be read as npz ({first_line(error)}); fetch it again") from None


def _npy_shape(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[str, tuple[int, ...]]:
    """Return dtype and shape of an array. Raises `ValueError` where they do not fit its bytes."""
    from numpy.lib import format as npy

    with archive.open(entry) as member:
        try:
            read = npy.read_array_header_1_0 if npy.read_magic(member) == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(member)
        except ARCHIVE_ERRORS:
            raise
        except Exception:  # numpy parses the description as Python, and raises whatever that does
            raise ValueError(f"{entry.filename} describes no array") from None
        size = math.prod(shape) * dtype.itemsize
        if not dtype.hasobject and size != entry.file_size - member.tell():
            raise ValueError(f"{entry.filename} has the shape {shape}, which does not fit its bytes")
    return dtype.name, shape


def map_tensor(stored: StoredTensor) -> NDArray[Any]:
    """Map a tensor of a safetensors file as a read-only array. Raises `BadInputError` for dtypes that numpy lacks."""
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
    """Return those arrays of `names` that the npz at `path` holds.

    Raises `BadInputError` for damaged files and for pickled objects.
    """
    import numpy as np

    if not zipfile.is_zipfile(path):
        raise BadInputError(f"{path}: not an npz archive, or cut short; fetch it again or save it with np.savez")
    held = npz_shapes(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names if name in held}
    except (*ARCHIVE_ERRORS, TypeError, OverflowError) as error:
        raise BadInputError(f"{path}: cannot be read as npz ({first_line(error)}); fetch it again") from None


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Map those arrays of `names` that the safetensors file at `path` holds, read-only."""
    tensors = read_safetensors_header(path).tensors
    return {name: map_tensor(tensors[name]) for name in names if name in tensors}


def read_document(header: FileHeader, schema: str, path: Path) -> dict[str, Any] | None:
    """Return the JSON object under ``ditmoe`` in a file's metadata; None where there is none.

    Raises `BadInputError` where it is malformed or not of `schema`.
    """
    text = header.metadata.get("ditmoe")
    if text is None:
        return None
    try:
        document = parse_json(text)
    except ValueError as error:
        raise BadInputError(f"{path}: the ditmoe metadata is not JSON ({first_line(error)})") from None
    return check_schema(document, schema, f"{path}: ditmoe metadata")


def write_arrays(
    path: Path,
    arrays: Mapping[str, NDArray[Any]],
    document: Mapping[str, Any],
    force: bool = False,
    inputs: Iterable[Path] = (),
) -> int:
    """Write arrays as safetensors, atomically, with `document` as JSON under ``ditmoe``; return the file's bytes."""
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
    """Write arrays as an uncompressed npz, atomically; return the file's bytes."""
    import numpy as np

    with staged(path, force, inputs) as staging:
        with staging.open("wb") as file:
            np.savez(file, allow_pickle=False, **dict(arrays))
        return staging.stat().st_size
