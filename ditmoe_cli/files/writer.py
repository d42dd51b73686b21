"""Streaming safetensors writers: few tensors in memory at a time, equal bytes for equal content.

All places in the files are known from headers, so that several threads put tensors at once, in any order. The metadata
holds the SHA-256 of each tensor; its length is known, so the header is written last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from ditmoe_cli.errors import DitmoeError
from ditmoe_cli.files.header import DTYPE_BYTES, FileHeader, TensorInfo, encode_header, read_safetensors_header
from ditmoe_cli.files.names import natural_key
from ditmoe_cli.files.provenance import Provenance, read_provenance, recorded_hashes
from ditmoe_cli.files.reader import SafetensorsReader
from ditmoe_cli.files.staging import CHECKPOINT_FILES, staged
from ditmoe_cli.files.streaming import Count, chunks, digested, hash_tensors, in_threads, syncing, write_at, write_parts
from ditmoe_cli.progress import BYTES, phase

FOLDER_STEM = "diffusion_pytorch_model"
DEFAULT_SHARD_BYTES = 10_000_000_000
_NO_HASH = "0" * 64

Metadata = Callable[[Mapping[str, str]], Mapping[str, str]]
Content = Callable[[TensorInfo], memoryview]


class Target(Protocol):
    """The place that an output's tensors are written to, in any order and by several threads."""

    def put(self, name: str, parts: Iterable[memoryview], known: str | None = None) -> str:
        """Write a tensor's bytes, which come in parts, and return their SHA-256: computed, unless it is `known`."""


Job = Callable[[Target], None]
"""Work of one thread: read or compute, and put some tensors of an output, possibly none."""


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
    """The destination of a checkpoint: one ``.safetensors`` file, or a folder in diffusers' layout.

    Attributes:
        path: of the file or folder.
        force: whether to replace what stands there.
        shard_bytes: bytes of tensors in the largest file of a folder.
        settings: what ``config.json`` of a folder says besides the configuration.
        beside: other files of a folder, by name.
        contents: what a folder that is replaced may hold, as `check_target` takes it.
    """

    path: Path
    force: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES
    settings: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, bytes] = field(default_factory=dict)
    contents: re.Pattern[str] = CHECKPOINT_FILES

    @property
    def is_file(self) -> bool:
        """Whether the output is a single file."""
        return self.path.suffix == ".safetensors"

    def _shards(self, tensors: Sequence[TensorInfo]) -> list[Shard]:
        return [Shard(self.path.name, tuple(tensors))] if self.is_file else plan_shards(tensors, self.shard_bytes)

    def _texts(self, shards: list[Shard], provenance: Provenance) -> dict[str, bytes]:
        return _folder_texts(shards, {**provenance.config, **self.settings})

    def predicted_bytes(self, tensors: Sequence[TensorInfo], provenance: Provenance) -> int:
        """Return the exact bytes of all files that `write` would write."""
        shards = self._shards(tensors)
        size = sum(file_bytes(shard.tensors, provenance.to_metadata) for shard in shards)
        others = {**self._texts(shards, provenance), **self.beside}
        return size if self.is_file else size + sum(map(len, others.values()))

    def write(
        self,
        tensors: Sequence[TensorInfo],
        jobs: Sequence[Job],
        provenance: Provenance,
        inputs: Iterable[Path],
        settled: Callable[[], Provenance] | None = None,
    ) -> int:
        """Write the checkpoint and return its bytes on disk.

        Args:
            tensors: all tensors of the checkpoint, in order.
            jobs: they put each of the tensors once. Several are done at a time.
            provenance: the metadata, of its final length.
            inputs: files that must not be written.
            settled: returns the final metadata when all jobs are done; by default `provenance`.
        """
        shards = self._shards(tensors)

        def final() -> Metadata:
            return (provenance if settled is None else settled()).to_metadata

        with staged(self.path, self.force, inputs, self.contents) as staging:
            if self.is_file:
                return write_files({staging: shards[0].tensors}, jobs, provenance.to_metadata, final)
            staging.mkdir()
            for name, text in {**self._texts(shards, provenance), **self.beside}.items():
                (staging / name).write_bytes(text)
            files = {staging / shard.name: shard.tensors for shard in shards}
            write_files(files, jobs, provenance.to_metadata, final)
            return sum(child.stat().st_size for child in staging.iterdir())

    def damage(self, known: Mapping[str, str]) -> str | None:
        """Return how what stands at the path differs from what `write` leaves with these settings, as ``is damaged``.

        None for not at all. Hashes all tensors but those of `known` SHA-256.
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
            texts = {} if self.is_file else self._texts(shards, provenance)
            changed = (name for name, text in texts.items() if (folder / name).read_bytes() != text)
            wrong = next(changed, None) or changed_tensor(headers, known)
        except (DitmoeError, OSError, KeyError, ValueError, StopIteration):
            return "is damaged"
        return None if wrong is None else f"is damaged ({wrong!r} is not what was written)"


def changed_tensor(headers: Mapping[str, FileHeader], known: Mapping[str, str]) -> str | None:
    """Return a tensor whose bytes are not those that its file says it was written with; None for none.

    Hashes all tensors but those of `known` SHA-256.
    """
    told = {tensor: text for name, h in headers.items() for tensor, text in recorded_hashes(h.metadata, name).items()}
    stored = {name: tensor for header in headers.values() for name, tensor in header.tensors.items()}
    left = [tensor.info for name, tensor in stored.items() if name not in known]
    with phase("checking the output", sum(info.nbytes for info in left), BYTES) as progress:
        found = {**known, **hash_tensors(left, SafetensorsReader(stored).raw, progress)}
    return next((name for name in stored if found[name] != told.get(name)), None)


def _folder_texts(shards: list[Shard], settings: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the JSON files of a checkpoint folder: ``config.json``, and the index where there are shards."""
    return {"config.json": pretty({"_class_name": "DiTMoE", **settings}), **index_text(shards)}


def index_text(shards: Sequence[Shard]) -> dict[str, bytes]:
    """Return the index of a folder's shards by its name; nothing for a single file."""
    if len(shards) == 1:
        return {}
    index = {
        "metadata": {"total_size": sum(info.nbytes for shard in shards for info in shard.tensors)},
        "weight_map": {info.name: shard.name for shard in shards for info in shard.tensors},
    }
    return {f"{FOLDER_STEM}.safetensors.index.json": pretty(index)}


def pretty(document: object) -> bytes:
    """Return a document as JSON for reading, its keys in order."""
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


@dataclass(frozen=True)
class _Place:
    """The place of a tensor: bytes from `start` of an open file, given by its descriptor."""

    file: int
    start: int
    info: TensorInfo


class _Files:
    """Open safetensors files that tensors are put into."""

    def __init__(self, places: Mapping[str, _Place], wrote: Count) -> None:
        self.places, self.wrote = places, wrote
        self.hashes: dict[str, str] = {}

    def put(self, name: str, parts: Iterable[memoryview], known: str | None = None) -> str:
        """See `Target.put`."""
        place, hashed = self.places[name], sha256()
        parts = digested(parts, hashed.update) if known is None else parts
        write_parts(place.file, place.start, place.info.nbytes, parts, self.wrote, name)
        self.hashes[name] = hashed.hexdigest() if known is None else known
        return self.hashes[name]


def write_files(
    files: Mapping[Path, Sequence[TensorInfo]],
    jobs: Sequence[Job],
    metadata: Metadata,
    settled: Callable[[], Metadata] | None = None,
) -> int:
    """Write safetensors files by `jobs`, which put the tensors of all of them, and return their bytes.

    A header's length is known before its hashes, by `metadata`: tensors are put behind it, and it is written last, with
    what `settled` returns when all jobs are done.
    """
    ordered = {path: aligned_order(tensors) for path, tensors in files.items()}
    blank = {path: dict.fromkeys((info.name for info in tensors), _NO_HASH) for path, tensors in ordered.items()}
    lengths = {path: len(encode_header(tensors, metadata(blank[path]))) for path, tensors in ordered.items()}
    with ExitStack() as stack:
        opened = {path: stack.enter_context(path.open("wb", buffering=0)) for path in files}
        descriptors = [file.fileno() for file in opened.values()]
        places = {
            place.info.name: place
            for path, tensors in ordered.items()
            for place in _places(opened[path].fileno(), lengths[path], tensors)
        }
        size = sum(lengths.values()) + sum(place.info.nbytes for place in places.values())
        with syncing(descriptors, size) as wrote:
            target = _Files(places, wrote)
            in_threads([partial(job, target) for job in jobs])
            missing = next((name for name in places if name not in target.hashes), None)
            if missing is not None:
                raise DitmoeError(f"internal error: {missing} was not written")
            final = metadata if settled is None else settled()
            for path, tensors in ordered.items():
                header = encode_header(tensors, final({info.name: target.hashes[info.name] for info in tensors}))
                if len(header) != lengths[path]:
                    raise DitmoeError(f"internal error: a header of {len(header)} bytes, planned {lengths[path]}")
                write_at(opened[path].fileno(), memoryview(header), 0)
    return size


def _places(file: int, start: int, tensors: Iterable[TensorInfo]) -> Iterator[_Place]:
    """Yield the places of tensors that follow each other from `start` of a file."""
    for info in tensors:
        yield _Place(file, start, info)
        start += info.nbytes


def one_by_one(tensors: Sequence[TensorInfo], content: Content) -> list[Job]:
    """Return jobs that put tensors whose bytes are at hand; ``content(info)`` returns them."""

    def put(info: TensorInfo, target: Target) -> None:
        target.put(info.name, chunks(content(info)))

    return [partial(put, info) for info in tensors]


def write_safetensors(path: Path, tensors: Sequence[TensorInfo], content: Content, metadata: Metadata) -> int:
    """Write a safetensors file and return its bytes; ``content(info)`` returns the bytes of a tensor."""
    return write_files({path: tensors}, one_by_one(tensors, content), metadata)
