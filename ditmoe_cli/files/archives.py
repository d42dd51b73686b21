"""Zip archives that nobody vouches for: what their entries expand to, and the parts of torch's."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ditmoe_cli.errors import BadInputError, first_line

# zipfile raises RuntimeError for encrypted entries, and NotImplementedError for unknown compression.
ARCHIVE_ERRORS = (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
_ALWAYS = 2**26  # bytes that entries may expand to in any case
_MOST_EXPANSION = 100  # beyond that; deflate reaches a thousand, and photographs two
_ENCRYPTED = 1
_LENGTHS = 26  # where an entry's own header has the lengths of its name and of what follows that


def check_expansion(path: Path, expanded: int, stored: int) -> None:
    """Raise `BadInputError` where what is at `path` expands beyond 64 MiB and 100 times its `stored` bytes."""
    if expanded > _ALWAYS + _MOST_EXPANSION * stored:
        raise BadInputError(f"{path}: expands to {expanded:,} bytes, far more than it has; it is damaged, or a trap")


@dataclass(frozen=True)
class ArchiveParts:
    """An archive as torch.save writes it: its pickle, and the bytes of each storage by key."""

    pickle: bytes
    storages: Mapping[str, int]


def read_torch_archive(path: Path) -> ArchiveParts:
    """Return the parts of an archive of torch's.

    Raises `BadInputError` for an archive that torch did not write: one with entries of equal names, compressed or
    encrypted ones, or bytes before or behind them. Two programs may read such an archive differently.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _require_of_torch(path, archive, entries)
            root = entries[0].filename.partition("/")[0]
            data = _content(path, archive, archive.getinfo(f"{root}/data.pkl"))
    except ARCHIVE_ERRORS as error:
        raise BadInputError(f"{path}: cannot be read as a checkpoint ({first_line(error)})") from None
    prefix = f"{root}/data/"
    storages = {
        entry.filename.removeprefix(prefix): entry.file_size for entry in entries if entry.filename.startswith(prefix)
    }
    return ArchiveParts(data, storages)


def read_note(path: Path, name: str) -> str | None:
    """Return the text of an entry `name` that stands beside the pickle of an archive; None where there is none.

    Raises `BadInputError` where it is none or larger than 64 MiB.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            full = f"{entries[0].filename.partition('/')[0]}/{name}" if entries else name
            entry = next((each for each in entries if each.filename == full), None)
            if entry is not None and entry.file_size > _ALWAYS:
                raise BadInputError(f"{path}: its entry {full!r} has {entry.file_size:,} bytes, too many for metadata")
            return None if entry is None else _content(path, archive, entry).decode()
    except ARCHIVE_ERRORS as error:
        raise BadInputError(f"{path}: its entry {name!r} cannot be read ({first_line(error)})") from None


def _content(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Return the bytes of an entry that is not compressed; its CRC-32 is 0 where torch saved without."""
    if entry.CRC:
        return archive.read(entry)
    with path.open("rb") as file:
        file.seek(entry.header_offset + _LENGTHS)
        name, extra = struct.unpack("<2H", file.read(4))
        file.seek(name + extra, os.SEEK_CUR)
        return file.read(entry.file_size)


def _require_of_torch(path: Path, archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> None:
    odd = next((e for e in entries if e.compress_type != zipfile.ZIP_STORED or e.flag_bits & _ENCRYPTED), None)
    if odd is not None:
        raise BadInputError(
            f"{path}: its entry {odd.filename!r} is compressed or encrypted, which torch does not read; unpack the "
            "archive and save it anew with torch.save"
        )
    names = {entry.filename.casefold() for entry in entries}
    within = sum(entry.file_size for entry in entries) <= path.stat().st_size
    if len(names) < len(entries) or archive.comment or not within or min(e.header_offset for e in entries):
        raise BadInputError(f"{path}: is no archive that torch wrote; save the state_dict() anew with torch.save")
