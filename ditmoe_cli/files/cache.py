"""The cache folder, for files that a later run may use again."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.json_text import read_json

_REMEDY = "set XDG_CACHE_HOME to a folder that can be written"


@dataclass(frozen=True)
class Cache:
    """The folder of the cache, not yet created.

    Attributes:
        folder: where files are kept.
        usual: where they are kept by default; the same folder, unless that cannot be written or is not known.
        problem: why it is another folder, empty where it is not.
    """

    folder: Path
    usual: Path | None
    problem: str = ""


def find_cache() -> Cache:
    """Return the cache: ``$XDG_CACHE_HOME/ditmoe``, by default ``~/.cache/ditmoe``, else a temporary folder.

    It is a temporary one where nobody knows the home folder, or where the usual one cannot be written; a relative
    XDG_CACHE_HOME counts as none, as its standard says (https://specifications.freedesktop.org/basedir-spec/).
    Raises `BadInputError` where no folder can be written.
    """
    usual = _usual()
    if usual is not None and _is_writable(usual):
        return Cache(usual, usual)
    problem = "there is no home folder" if usual is None else f"{usual} cannot be written"
    try:
        folder = Path(tempfile.gettempdir()) / f"ditmoe-{os.getuid()}"
    except FileNotFoundError:
        raise BadInputError(f"no folder for the cache: {problem}, and no temporary one; {_REMEDY}") from None
    if not _is_own(folder):
        raise BadInputError(f"no folder for the cache: {problem}, and {folder} is somebody else's; {_REMEDY}")
    return Cache(folder, usual, f"{problem}; the cache is in {folder}")


def cache_folder(*parts: str) -> Path:
    """Return a folder of the cache, without creating it. Raises `BadInputError` where none can be written."""
    return find_cache().folder.joinpath(*parts)


def cached_file(name: str) -> Path:
    """Return the path of a file of the cache: in the usual folder where it is there, though that be read-only."""
    cache = find_cache()
    if cache.usual is not None and (cache.usual / name).is_file():
        return cache.usual / name
    return cache.folder / name


@cache
def torch_version() -> str:
    """Return the version of torch, which numbers rest on, without importing it; nothing where it is not installed."""
    from importlib import metadata  # takes as long as all the rest of --help

    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def kept_numbers(name: str) -> dict[str, float]:
    """Return the numbers, by key, of a JSON file of the cache; what is no such file holds none."""
    with suppress(OSError, RuntimeError, ValueError, BadInputError):
        found = read_json(cache_folder() / name)
        if isinstance(found, dict):
            return {key: number for key, number in found.items() if isinstance(number, float)}
    return {}


def keep_number(name: str, key: str, number: float) -> None:
    """Add a number to a JSON file of the cache, where it can be written."""
    with suppress(OSError, RuntimeError, BadInputError):
        file = cache_folder() / name
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.{os.getpid()}")
        new.write_text(json.dumps({**kept_numbers(name), key: number}, indent=1, sort_keys=True))
        new.replace(file)


def _usual() -> Path | None:
    """Return the usual folder, None where nobody knows the home folder."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given / "ditmoe"
    try:
        home = Path.home()  # $HOME, else that of the user's entry in /etc/passwd
    except RuntimeError:
        return None
    return home / ".cache" / "ditmoe" if home.is_absolute() else None


def _is_writable(folder: Path) -> bool:
    """Return whether files can be written into a folder, or into one that is yet to be made."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
    except PermissionError:
        return False
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _is_own(folder: Path) -> bool:
    """Return whether a folder may hold what we read again: it is ours and no link, or is not there yet."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return _is_writable(folder)
    return folder.is_dir() and not folder.is_symlink() and status.st_uid == os.getuid() and _is_writable(folder)
