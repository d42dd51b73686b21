"""Lazy readers: tensors by upstream name, one at a time, from any container.

Opening a safetensors checkpoint imports neither torch nor numpy; reading its first tensor imports torch. Opening a
pickle imports torch.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ditmoe_cli.errors import BadInputError, first_line
from ditmoe_cli.files.archives import read_note
from ditmoe_cli.files.containers import Located, consolidation, locate
from ditmoe_cli.files.header import StoredTensor, TensorInfo, read_safetensors_header
from ditmoe_cli.files.json_text import read_json
from ditmoe_cli.files.licences import licence_in_metadata
from ditmoe_cli.files.pickles import read_shards, read_state_dict
from ditmoe_cli.files.pipelines import pipeline_hints
from ditmoe_cli.files.provenance import Provenance, read_provenance, recorded_hashes
from ditmoe_cli.files.selection import Entry, all_of, select
from ditmoe_cli.files.shared_memory import shared_bytes
from ditmoe_cli.files.torch_archive import NOTE

if TYPE_CHECKING:
    import torch


class TensorReader(Protocol):
    """Read tensors by their upstream names."""

    def raw(self, name: str) -> memoryview:
        """Return the bytes of a tensor."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as stored, on the CPU, in memory of its own: models are changed in place."""


@dataclass(frozen=True)
class CheckpointHeader:
    """The contents of a checkpoint as known before any tensor is read.

    Attributes:
        path: the file or folder that was opened.
        layout: the name of the layout.
        tensors: descriptions in natural order, by upstream name.
        file_bytes: the bytes of all files.
        hints: training arguments of a pickle, and what a ``config.json`` beside the files says.
        provenance: the ``ditmoe`` metadata of files that ditmoe wrote.
        recorded: the SHA-256 of tensors by upstream name, as that metadata says, whatever became of the tensors since.
        notes: which weights were taken, where there was a choice.
        warnings: what looks like weights, and is not read.
        licence: what the metadata of safetensors names; None where it names none.
    """

    path: Path
    layout: str
    tensors: Mapping[str, TensorInfo]
    file_bytes: int
    hints: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance | None = None
    recorded: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    licence: str | None = None


def open_reader(path: Path) -> tuple[CheckpointHeader, TensorReader]:
    """Open the checkpoint at `path`, of any layout. Raises `BadInputError` where it is missing or damaged."""
    try:
        located = locate(path)
        header, reader = _open_pickle(path, located) if located.pickles else _open_safetensors(path, located)
        beside = {} if located.config is None else _read_config(located.config)
        beside |= pipeline_hints((*located.shards, *located.pickles)[0])
    except PermissionError as error:
        raise BadInputError(f"{error.filename}: permission denied") from None
    own = header.provenance.config if header.provenance else header.hints
    outvoted = [
        f"{located.config} says {name}={value!r}, but the weights' own file {own[name]!r}, which holds"
        for name, value in beside.items()
        if name in own and own[name] != value
    ]
    hints, notes = {**beside, **header.hints}, (*located.notes, *header.notes)
    return replace(header, hints=hints, notes=notes, warnings=(*header.warnings, *outvoted)), reader


def _read_config(path: Path) -> dict[str, Any]:
    """Return what a ``config.json`` says. Raises `BadInputError` where it is no JSON object."""
    try:
        document = read_json(path, finite=False)
    except ValueError as error:
        raise BadInputError(f"{path}: is not JSON ({first_line(error)}); mend or remove it") from None
    if not isinstance(document, dict):
        raise BadInputError(f"{path}: is no JSON object; mend or remove it")
    return document


def _open_safetensors(path: Path, located: Located) -> tuple[CheckpointHeader, TensorReader]:
    stored: dict[str, StoredTensor] = {}
    provenances: dict[Path, Provenance] = {}
    recorded: dict[str, str] = {}
    licences: list[str] = []
    for shard in located.shards:
        header = read_safetensors_header(shard)
        licences += filter(None, [licence_in_metadata(header.metadata)])
        twice = stored.keys() & header.tensors.keys()
        if twice:
            raise BadInputError(f"{shard}: tensor {min(twice)!r} stands in another shard too")
        stored.update(header.tensors)
        recorded.update(recorded_hashes(header.metadata, str(shard)))
        provenance = read_provenance(header.metadata, str(shard))
        if provenance is not None:
            provenances[shard] = provenance
    first = next(iter(provenances.values()), None)
    other = next((shard for shard, provenance in provenances.items() if provenance != first), None)
    if other is not None:
        raise BadInputError(
            f"{other}: is of another checkpoint than the other shards, by its metadata; fetch them anew"
        )
    entries = [Entry((), name, tensor.info.shape) for name, tensor in stored.items()]
    try:
        selection = select(entries) or all_of(entries)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from None
    _refuse_missing(path, recorded, selection.entries)
    reader = SafetensorsReader({name: stored[entry.name] for name, entry in selection.entries.items()})
    infos = {name: _renamed(tensor.info, name) for name, tensor in reader.stored.items()}
    size = sum(shard.stat().st_size for shard in located.shards)
    layout = f"{located.layout}, names under {selection.shown!r}" if selection.shown else located.layout
    notes, licence = (selection.notes, selection.warnings), next(iter(licences), None)
    return CheckpointHeader(path, layout, infos, size, {}, first, recorded, *notes, licence), reader


def _refuse_missing(path: Path, recorded: Mapping[str, str], present: Collection[str]) -> None:
    """Raise `BadInputError` where a tensor that the metadata lists is missing.

    Of some weights nothing else tells that a part is missing: without its zero points an integer format is another one.
    """
    missing = [name for name in recorded if name not in present]
    if missing:
        more = f", and {len(missing) - 1} more are" if len(missing) > 1 else ""
        raise BadInputError(
            f"{path}: tensor {missing[0]!r} is missing{more}, though the ditmoe metadata lists it; another program has "
            "rewritten the file, take the one that ditmoe wrote"
        )


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
    files = located.pickles
    pickled = read_state_dict(files[0]) if len(files) == 1 else read_shards(files)
    layout = pickled.layout if located.layout == "pickle" else f"{located.layout}, {pickled.layout}"
    reader = PickleReader(pickled.tensors)
    for name, value in pickled.tensors.items():
        if value.numel() == 0 or pickled.whole.get(name, tuple(value.shape)) != tuple(value.shape):
            part = "empty" if value.numel() == 0 else "a part of the whole"
            advice = (
                consolidation(files[0].parent)
                if pickled.whole or files[0].name.endswith("_model_states.pt")
                else "put them together with its zero_to_fp32, or gather them before saving"
            )
            raise BadInputError(
                f"{files[0]}: tensor {name!r} is {part}, as ZeRO leaves those that it divides over processes; {advice}"
            )
    infos = {name: _pickled_info(files[0], name, value) for name, value in reader.state.items()}
    size = sum(file.stat().st_size for file in files)
    note = read_note(files[0], NOTE) if len(files) == 1 else None
    metadata = {} if note is None else {"ditmoe": note}
    provenance, recorded = read_provenance(metadata, str(files[0])), recorded_hashes(metadata, str(files[0]))
    _refuse_missing(path, recorded, infos)
    told = (pickled.hints, provenance, recorded, pickled.notes, pickled.warnings)
    return CheckpointHeader(path, layout, infos, size, *told), reader


def _pickled_info(path: Path, name: str, value: torch.Tensor) -> TensorInfo:
    if str(value.layout) != "torch.strided" or value.is_meta or value.is_quantized or value.is_nested:
        raise BadInputError(
            f"{path}: tensor {name!r} is sparse, quantised by torch or without data; ditmoe reads dense tensors only"
        )
    return TensorInfo(name, dtype_code(value.dtype, f"{path}: tensor {name!r}"), tuple(value.shape))


@dataclass(frozen=True)
class PickleReader:
    """Read from a state dict, which is memory-mapped where torch can map its pickle."""

    state: Mapping[str, torch.Tensor]

    def raw(self, name: str) -> memoryview:
        """Return the bytes of a tensor."""
        return tensor_bytes(self.state[name])

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, copied out of the state dict."""
        import torch

        return self.state[name].detach().clone(memory_format=torch.contiguous_format)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's elements as little-endian bytes in row-major order."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def shared_tensor(data: memoryview, info: TensorInfo) -> torch.Tensor:
    """Return the tensor that bytes are, in the same memory; where that is a mapped file, writing to it is a crash."""
    import torch

    dtype = torch_dtype(info.dtype)
    return shared_bytes(data).view(dtype).reshape(info.shape) if info.numel else torch.empty(info.shape, dtype=dtype)


@cache
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
    raise BadInputError(
        f"{where} has dtype {name}, which ditmoe does not read; save it as float32, bfloat16 or float16"
    )
