"""Streaming safetensors writers: one tensor in memory at a time, equal bytes for equal content.

The metadata holds the SHA-256 of each tensor. Its length is known, so the header is written first with zeros in place
of the hashes, and again at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ditmoe_cli.errors import DitmoeError
from ditmoe_cli.files.header import DTYPE_BYTES, FileHeader, TensorInfo, encode_header, read_safetensors_header
from ditmoe_cli.files.names import natural_key
from ditmoe_cli.files.provenance import Provenance, read_provenance
from ditmoe_cli.files.reader import SafetensorsReader
from ditmoe_cli.files.staging import staged
from ditmoe_cli.files.streaming import hash_tensors
from ditmoe_cli.progress import BYTES, phase

FOLDER_STEM = "diffusion_pytorch_model"
DEFAULT_SHARD_BYTES = 10_000_000_000
_NO_HASH = "0" * 64

Metadata = Callable[[Mapping[str, str]], Mapping[str, str]]
Content = Callable[[TensorInfo], memoryview]


@dataclass(frozen=True)
class Shard:
    """A file of an output: its name, and its tensors in order."""

    name: str
    tensors: tuple[TensorInfo, ...]


def aligned_order(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Return tensors in an order that aligns each to its element size, as readers that map files need.

    Tensors whose bytes are a multiple of eight keep their order; the others follow, wide elements first.
    """
    listed = list(tensors)
    rest = sorted((t for t in listed if t.nbytes % 8), key=lambda t: -DTYPE_BYTES[t.dtype])
    return [t for t in listed if t.nbytes % 8 == 0] + rest


def file_bytes(tensors: Sequence[TensorInfo], metadata: Metadata) -> int:
    """Return the exact bytes of the safetensors file of `tensors`, its header included."""
    placeholder = metadata({info.name: _NO_HASH for info in tensors})
    return len(encode_header(aligned_order(tensors), placeholder)) + sum(info.nbytes for info in tensors)


def plan_shards(tensors: Sequence[TensorInfo], shard_bytes: int = DEFAULT_SHARD_BYTES) -> list[Shard]:
    """Divide tensors, in order, over files of at most `shard_bytes` of tensors, but at least one tensor."""
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in tensors:
        if groups[-1] and filled + info.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(info)
        filled += info.nbytes
    if len(groups) == 1:
        return [Shard(f"{FOLDER_STEM}.safetensors", tuple(groups[0]))]
    count = len(groups)
    return [
        Shard(f"{FOLDER_STEM}-{i:05d}-of-{count:05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, start=1)
    ]


@dataclass(frozen=True)
class Output:
    """The destination of a checkpoint: one ``.safetensors`` file, or a folder in diffusers' layout."""

    path: Path
    force: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES

    @property
    def is_file(self) -> bool:
        """Whether the output is a single file."""
        return self.path.suffix == ".safetensors"

    def _shards(self, tensors: Sequence[TensorInfo]) -> list[Shard]:
        return [Shard(self.path.name, tuple(tensors))] if self.is_file else plan_shards(tensors, self.shard_bytes)

    def predicted_bytes(self, tensors: Sequence[TensorInfo], provenance: Provenance) -> int:
        """Return the exact bytes of all files that `write` would write."""
        shards = self._shards(tensors)
        size = sum(file_bytes(shard.tensors, provenance.to_metadata) for shard in shards)
        return size if self.is_file else size + sum(map(len, _folder_texts(shards, provenance).values()))

    def write(
        self, tensors: Sequence[TensorInfo], content: Content, provenance: Provenance, inputs: Iterable[Path]
    ) -> int:
        """Write the checkpoint and return its bytes on disk; ``content(info)`` returns a tensor's bytes."""
        shards = self._shards(tensors)
        with staged(self.path, self.force, inputs) as staging:
            if self.is_file:
                return write_safetensors(staging, shards[0].tensors, content, provenance.to_metadata)
            staging.mkdir()
            for name, text in _folder_texts(shards, provenance).items():
                (staging / name).write_bytes(text)
            for shard in shards:
                write_safetensors(staging / shard.name, shard.tensors, content, provenance.to_metadata)
            return sum(child.stat().st_size for child in staging.iterdir())

    def damage(self) -> str | None:
        """Return how what stands at the path differs from what `write` leaves with these settings, as ``is damaged``.

        None for not at all. Hashes all tensors.
        """
        folder = self.path.parent if self.is_file else self.path
        try:
            files = [self.path] if self.is_file else sorted(self.path.glob("*.safetensors"))
            headers = {file.name: read_safetensors_header(file) for file in files}
            infos = [stored.info for header in headers.values() for stored in header.tensors.values()]
            shards = self._shards(sorted(infos, key=lambda info: natural_key(info.name)))
            if {shard.name: set(shard.tensors) for shard in shards} != {
                name: {stored.info for stored in header.tensors.values()} for name, header in headers.items()
            }:
                return "is laid out in other files"
            provenance = read_provenance(next(iter(headers.values())).metadata, str(self.path))
            if provenance is None:
                return "does not tell how it was made"
            texts = {} if self.is_file else _folder_texts(shards, provenance)
            changed = (name for name, text in texts.items() if (folder / name).read_bytes() != text)
            wrong = next(changed, None) or _wrong(headers.values())
        except (DitmoeError, OSError, KeyError, ValueError, StopIteration):
            return "is damaged"
        return None if wrong is None else f"is damaged ({wrong!r} is not what was written)"


def _wrong(headers: Collection[FileHeader]) -> str | None:
    """Return a tensor whose bytes are not those that its file was written with; None for none."""
    told = {name: text for header in headers for name, text in json.loads(header.metadata["ditmoe"])["tensors"].items()}
    stored = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    with phase("checking the output", sum(tensor.info.nbytes for tensor in stored.values()), BYTES) as progress:
        found = hash_tensors((t.info for t in stored.values()), SafetensorsReader(stored).raw, progress)
    return next((name for name in stored if found[name] != told[name]), None)


def _folder_texts(shards: list[Shard], provenance: Provenance) -> dict[str, bytes]:
    """Return the JSON files of a checkpoint folder: ``config.json``, and the index where there are shards."""
    config = {"_class_name": "DiTMoE", **provenance.config}
    texts = {"config.json": _pretty(config)}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(info.nbytes for shard in shards for info in shard.tensors)},
            "weight_map": {info.name: shard.name for shard in shards for info in shard.tensors},
        }
        texts[f"{FOLDER_STEM}.safetensors.index.json"] = _pretty(index)
    return texts


def _pretty(document: object) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def write_safetensors(path: Path, tensors: Sequence[TensorInfo], content: Content, metadata: Metadata) -> int:
    """Write a safetensors file and return its bytes; ``content(info)`` returns the bytes of one tensor at a time."""
    ordered = aligned_order(tensors)
    hashes = {info.name: _NO_HASH for info in ordered}
    with path.open("wb") as file:
        file.write(encode_header(ordered, metadata(hashes)))
        for info in ordered:
            data = content(info)
            if data.nbytes != info.nbytes:
                raise DitmoeError(f"internal error: {info.name} has {data.nbytes} bytes, planned {info.nbytes}")
            file.write(data)
            hashes[info.name] = hashlib.sha256(data).hexdigest()
        size = file.tell()
        file.seek(0)
        file.write(encode_header(ordered, metadata(hashes)))
    return size
