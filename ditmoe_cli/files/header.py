"""The safetensors header, read and written without torch or numpy.

A safetensors file is an 8-byte little-endian length, a JSON object of that length, and the tensors' bytes.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.json_text import parse_json

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
FLOATING = frozenset({"F16", "BF16", "F32", "F64"})
_LONGEST_HEADER = 100_000_000  # the safetensors library's own limit
_MOST_DIMENSIONS = 32  # numpy's limit up to 1.26
_MOST_ELEMENTS = 2**63 - 1


@dataclass(frozen=True)
class TensorInfo:
    """Name, safetensors dtype code and shape of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the elements."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its bytes are those from `start` up to, without, `end`."""

    info: TensorInfo
    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class FileHeader:
    """The header of a safetensors file: its tensors by name, and its metadata."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def _parse_entry(path: Path, name: str, entry: object, data_start: int, size: int) -> StoredTensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise BadInputError(f"{path}: header entry of tensor {name!r} is malformed; the file is corrupt")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise BadInputError(f"{path}: tensor {name!r} has dtype {dtype!r}, which ditmoe does not read")
    whole = [n for n in (shape if isinstance(shape, list) else [None]) if type(n) is int and n >= 0]
    is_shape = isinstance(shape, list) and len(whole) == len(shape) <= _MOST_DIMENSIONS
    if not is_shape or math.prod(max(n, 1) for n in whole) > _MOST_ELEMENTS:
        raise BadInputError(f"{path}: tensor {name!r} has shape {shape!r}; the file is corrupt")
    info = TensorInfo(name, dtype, tuple(whole))
    match offsets:
        case [int(begin), int(end)] if 0 <= begin <= end and end - begin == info.nbytes:
            pass
        case _:
            raise BadInputError(f"{path}: tensor {name!r} has offsets {offsets!r}, which do not fit its shape")
    if isinstance(begin, bool) or isinstance(end, bool):
        raise BadInputError(f"{path}: tensor {name!r} has offsets {offsets!r}, which are no numbers")
    if data_start + end > size:
        raise BadInputError(
            f"{path}: tensor {name!r} ends at byte {data_start + end}, but the file has {size} bytes; "
            "it is truncated, fetch it again"
        )
    return StoredTensor(info, path, data_start + begin, data_start + end)


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do, whatever its name: a length, and JSON of at most that length."""
    try:
        with path.open("rb") as file:
            length, brace, size = file.read(8), file.read(1), os.fstat(file.fileno()).st_size
    except OSError:
        return False
    return brace == b"{" and 2 <= int.from_bytes(length, "little") <= min(size - 8, _LONGEST_HEADER)


def read_safetensors_header(path: Path) -> FileHeader:
    """Return the header of the safetensors file at `path`.

    Raises `BadInputError` where the file is truncated or its header does not describe its bytes.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size == 0:
                raise BadInputError(f"{path}: is empty; fetch it again")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise BadInputError(f"{path}: not a safetensors file, or cut short inside its header ({size} bytes)")
            text = file.read(length)
    except PermissionError:
        raise BadInputError(f"{path}: permission denied") from None
    try:
        header: Any = parse_json(text)
    except ValueError as error:
        raise BadInputError(f"{path}: the safetensors header is not JSON ({error}); the file is corrupt") from None
    if not isinstance(header, dict):
        raise BadInputError(f"{path}: the safetensors header is not a JSON object; the file is corrupt")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadInputError(f"{path}: the safetensors metadata is not a map of strings; the file is corrupt")
    tensors = {name: _parse_entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_tiling(path, list(tensors.values()), 8 + length, size)
    return FileHeader(tensors, metadata)


def _check_tiling(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """Raise `BadInputError` unless tensors fill the file to its end, without gap or overlap."""
    position = data_start
    for tensor in sorted(tensors, key=lambda t: (t.start, t.end)):
        if tensor.start != position:
            raise BadInputError(f"{path}: tensor {tensor.info.name!r} overlaps or leaves a gap; the file is corrupt")
        position = tensor.end
    if position != size:
        raise BadInputError(f"{path}: {size - position} bytes follow the last tensor; the file is corrupt")


def encode_header(tensors: list[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Return the header bytes, length prefix included, of a file that holds `tensors` in the given order.

    The keys of each object are sorted, and the JSON is padded with spaces to a multiple of eight bytes, so that equal
    content gives equal bytes. The safetensors library orders metadata at random.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for info in tensors:
        offsets = [position, position + info.nbytes]
        header[info.name] = {"data_offsets": offsets, "dtype": info.dtype, "shape": list(info.shape)}
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
