"""Lazy readers: tensors by upstream name, one at a time, from any container.

Opening a safetensors checkpoint imports neither torch nor numpy; reading its first tensor imports torch. Opening a
pickle imports torch.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.containers import Located, locate
from ditmoe_cli.files.header import StoredTensor, TensorInfo, read_safetensors_header
from ditmoe_cli.files.names import natural_key, unwrapped
from ditmoe_cli.files.pickles import read_state_dict
from ditmoe_cli.files.provenance import Provenance, read_provenance

if TYPE_CHECKING:
    import torch


class TensorReader(Protocol):
    """Read tensors by their upstream names."""

    def raw(self, name: str) -> memoryview:
        """Return the bytes of a tensor."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as stored, on the CPU. It may share memory with the file and must not be changed."""


@dataclass(frozen=True)
class CheckpointHeader:
    """The contents of a checkpoint as known before any tensor is read.

    `tensors` are in natural order under upstream names, `hints` the training arguments of a pickle, `provenance` the
    ``ditmoe`` metadata of files that ditmoe wrote.
    """

    path: Path
    layout: str
    tensors: Mapping[str, TensorInfo]
    file_bytes: int
    hints: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance | None = None


def open_reader(path: Path) -> tuple[CheckpointHeader, TensorReader]:
    """Open the checkpoint at `path`, of any layout. Raises `BadInputError` where it is missing or damaged."""
    located = locate(path)
    try:
        return _open_pickle(path, located) if located.pickle else _open_safetensors(path, located)
    except PermissionError as error:
        raise BadInputError(f"{error.filename}: permission denied") from None


def _open_safetensors(path: Path, located: Located) -> tuple[CheckpointHeader, TensorReader]:
    stored: dict[str, StoredTensor] = {}
    provenance = None
    for shard in located.shards:
        header = read_safetensors_header(shard)
        twice = stored.keys() & header.tensors.keys()
        if twice:
            raise BadInputError(f"{shard}: tensor {min(twice)!r} stands in another shard too")
        stored.update(header.tensors)
        provenance = provenance or read_provenance(header.metadata, str(shard))
    named = unwrapped(sorted(stored, key=natural_key))
    reader = SafetensorsReader({name: stored[original] for name, original in named.items()})
    infos = {name: _renamed(tensor.info, name) for name, tensor in reader.stored.items()}
    size = sum(shard.stat().st_size for shard in located.shards)
    return CheckpointHeader(path, located.layout, infos, size, {}, provenance), reader


def _renamed(info: TensorInfo, name: str) -> TensorInfo:
    return TensorInfo(name, info.dtype, info.shape)


@dataclass(frozen=True)
class SafetensorsReader:
    """Read from memory-mapped safetensors files."""

    stored: Mapping[str, StoredTensor]

    @cached_property
    def _maps(self) -> dict[Path, mmap.mmap]:
        return {}

    def raw(self, name: str) -> memoryview:
        """Return the bytes of a tensor as a view of the mapped file."""
        tensor = self.stored[name]
        if tensor.path not in self._maps:
            with tensor.path.open("rb") as file:
                self._maps[tensor.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(self._maps[tensor.path])[tensor.start : tensor.end]

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, copied out of the file."""
        import torch

        info = self.stored[name].info
        data = torch.frombuffer(bytearray(self.raw(name)), dtype=torch.uint8) if info.numel else torch.empty(0)
        return data.view(torch_dtype(info.dtype)).reshape(info.shape)


def _open_pickle(path: Path, located: Located) -> tuple[CheckpointHeader, TensorReader]:
    assert located.pickle is not None
    pickled = read_state_dict(located.pickle)
    layout = pickled.layout if located.layout == "pickle" else f"{located.layout}, {pickled.layout}"
    named = unwrapped(sorted(pickled.tensors, key=natural_key))
    reader = PickleReader({name: pickled.tensors[original] for name, original in named.items()})
    infos = {name: _pickled_info(located.pickle, name, value) for name, value in reader.state.items()}
    return CheckpointHeader(path, layout, infos, located.pickle.stat().st_size, pickled.hints), reader


def _pickled_info(path: Path, name: str, value: torch.Tensor) -> TensorInfo:
    if value.numel() == 0:
        raise BadInputError(f"{path}: tensor {name!r} is an empty ZeRO-3 placeholder; run zero_to_fp32.py first")
    if str(value.layout) != "torch.strided" or value.is_meta:
        raise BadInputError(f"{path}: tensor {name!r} is sparse or without data; ditmoe reads dense tensors only")
    return TensorInfo(name, dtype_code(value.dtype, f"{path}: tensor {name!r}"), tuple(value.shape))


@dataclass(frozen=True)
class PickleReader:
    """Read from a state dict, which is memory-mapped where torch can map its pickle."""

    state: Mapping[str, torch.Tensor]

    def raw(self, name: str) -> memoryview:
        """Return the bytes of a tensor."""
        return tensor_bytes(self.state[name])

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        return self.state[name]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's elements as little-endian bytes in row-major order."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _dtype_names() -> dict[str, str]:
    floats = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    integers = {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
    return {**floats, **integers, "U8": "uint8", "BOOL": "bool", "U16": "uint16", "U32": "uint32"}


def torch_dtype(code: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype code. Raises `BadInputError` for codes that torch lacks."""
    import torch

    names = _dtype_names()
    if code not in names:
        raise BadInputError(f"dtype {code} is not one that ditmoe computes with")
    dtype: torch.dtype = getattr(torch, names[code])
    return dtype


def dtype_code(dtype: torch.dtype, where: str) -> str:
    """Return the safetensors code of a torch dtype. Raises `BadInputError`, naming `where`, for other dtypes."""
    name = str(dtype).removeprefix("torch.")
    for code, candidate in _dtype_names().items():
        if candidate == name:
            return code
    raise BadInputError(f"{where} has dtype {name}, which safetensors files of ditmoe do not hold")
