"""Whether a checkpoint is what was written: every byte read once, and compared with what the files say of themselves.

- Files of ditmoe hold the SHA-256 of each tensor in their metadata.
- Zip archives, as torch writes them, hold a CRC-32 of each member, unless they were saved without.
- An index says which tensor is in which shard, and how many bytes they have.
- Floating tensors of any file hold neither NaN nor infinite values.

Takes neither torch nor numpy, and a few megabytes: files are mapped, and read in chunks in several threads.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.containers import INDEX, locate, shard_names
from ditmoe_cli.files.finite import finite_bytes
from ditmoe_cli.files.header import TensorInfo, read_safetensors_header
from ditmoe_cli.files.json_text import read_json
from ditmoe_cli.files.reader import CheckpointHeader, TensorReader
from ditmoe_cli.files.streaming import CHUNK, Count, chunks, in_threads, one_at_a_time
from ditmoe_cli.progress import BYTES, phase


@dataclass(frozen=True)
class Integrity:
    """What reading a whole checkpoint has shown.

    Attributes:
        hashes: the SHA-256 of each tensor by upstream name.
        bytes: how many bytes of tensors were read.
        recorded: how many tensors have a hash in the metadata to compare with.
        members: how many members of zip archives have a CRC-32 to compare with.
        problems: what is wrong, each in one line; those of one kind stand together.
    """

    hashes: Mapping[str, str]
    bytes: int
    recorded: int
    members: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Problem:
    """What is wrong with a tensor, a member of an archive, or a whole file."""

    kind: str
    name: str
    text: str


def examine(header: CheckpointHeader, reader: TensorReader) -> Integrity:
    """Read all bytes of a checkpoint and return what they show.

    Raises `BadInputError` for files that vanished or changed their layout since they were opened.
    """
    located = locate(header.path)
    infos = list(header.tensors.values())
    size = sum(info.nbytes for info in infos)
    archived = sum(file.stat().st_size for file in located.pickles)
    with phase(f"verifying {header.path.name}", size + archived, BYTES) as progress:
        count = one_at_a_time(progress)
        read = in_threads([partial(_read_tensor, info, reader.raw, count) for info in infos])
        archives = [_check_archive(file, count) for file in located.pickles]
    hashes = {info.name: found for info, (found, _) in zip(infos, read, strict=True)}
    broken = [info.name for info, (_, finite) in zip(infos, read, strict=True) if not finite]
    problems = (
        *_compared(header, hashes),
        *(Problem("not finite", name, f"tensor {name!r} holds NaN or infinite values") for name in broken),
        *(problem for _, found in archives for problem in found),
        *(_check_index(index, located.shards) if (index := _index_of(header.path, located.shards)) else ()),
    )
    compared = sum(name in header.recorded for name in hashes)
    return Integrity(hashes, size, compared, sum(members for members, _ in archives), problems)


def _read_tensor(info: TensorInfo, raw: Callable[[str], memoryview], count: Count) -> tuple[str, bool]:
    """Return the SHA-256 of a tensor's bytes, and whether its values are finite."""
    hashed, finite = hashlib.sha256(), True
    for chunk in chunks(raw(info.name)):
        hashed.update(chunk)  # which reads the file without the interpreter's lock
        finite = finite and finite_bytes(bytes(chunk), info.dtype)
        count(chunk.nbytes)
    return hashed.hexdigest(), finite


def _compared(header: CheckpointHeader, hashes: Mapping[str, str]) -> Iterator[Problem]:
    """Yield the tensors that differ from the hashes in the metadata, and those that it does not list."""
    recorded = header.recorded
    for name, found in hashes.items():
        if name in recorded and recorded[name] != found:
            yield Problem("changed", name, f"tensor {name!r} is not what ditmoe wrote: its SHA-256 differs")
    for name in hashes if recorded else ():
        if name not in recorded:
            yield Problem(
                "unrecorded", name, f"tensor {name!r} has no SHA-256 in the metadata: ditmoe did not write it"
            )


def _check_archive(path: Path, count: Count) -> tuple[int, list[Problem]]:
    """Return how many members of a zip archive have a CRC-32, and those that differ from it.

    A pickle from before torch 1.6 is no archive and has none, nor has one that was saved without.
    """
    if not zipfile.is_zipfile(path):
        count(path.stat().st_size)
        return 0, []
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.file_size]
        if not any(member.CRC for member in members):
            count(path.stat().st_size)
            return 0, []
        found = in_threads([partial(_member_problem, path, archive, member, count) for member in members])
    return len(members), [problem for problem in found if problem]


def _member_problem(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, count: Count) -> Problem | None:
    """Return what is wrong with a member of a zip archive."""
    try:
        with archive.open(member) as opened:
            while data := opened.read(CHUNK):
                count(len(data))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        text = f"{path.name}: {member.filename!r} in the archive is damaged ({str(error) or 'cut short'})"
        return Problem("damaged", member.filename, text)
    return None


def _index_of(path: Path, shards: Iterable[Path]) -> Path | None:
    """Return the index of the shards; None where there is none."""
    if INDEX.fullmatch(path.name) and path.is_file():
        return path
    files = list(shards)
    names, folder = sorted(file.name for file in files), files[0].parent if files else path
    found = (file for file in sorted(folder.iterdir()) if INDEX.fullmatch(file.name)) if path.is_dir() else ()
    return next((file for file in found if shard_names(file) == names), None)


def _check_index(index: Path, shards: Iterable[Path]) -> Iterator[Problem]:
    """Yield where an index of safetensors contradicts its shards."""
    document: Any = read_json(index)
    told: Mapping[str, str] = document["weight_map"]
    held = {
        name: (file.name, tensor) for file in shards for name, tensor in read_safetensors_header(file).tensors.items()
    }
    for name, file in told.items():
        if name not in held:
            yield Problem("index", name, f"{index.name} lists tensor {name!r} in {file}, which does not hold it")
        elif held[name][0] != file:
            yield Problem("index", name, f"{index.name} lists tensor {name!r} in {file}, but {held[name][0]} holds it")
    for name, (file, _) in held.items():
        if name not in told:
            yield Problem("index", name, f"{index.name} does not list tensor {name!r}, which {file} holds")
    described = document.get("metadata")
    total = described.get("total_size") if isinstance(described, Mapping) else None
    size = sum(tensor.info.nbytes for _, tensor in held.values())
    if isinstance(total, int) and total != size:
        yield Problem("index", index.name, f"{index.name} says total_size {total}, but the shards hold {size} bytes")


def require_whole(path: Path, problems: Sequence[Problem]) -> None:
    """Raise `BadInputError` for a checkpoint that has problems: with the first, and how many more there are."""
    if problems:
        left = len(problems) - 1
        more = f", and {left} more {'is' if left == 1 else 'are'} wrong" if left else ""
        raise BadInputError(f"{path}: {problems[0].text}{more}; fetch or make it anew")
