"""Whether writing an output would touch an input: told by what files and folders are, not by what they are called.

Two names are one file through links, through a folder that is mounted twice, and where case makes no difference.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ditmoe_cli.files.containers import INDEX, shard_names

Identity = tuple[int, int]
_MOST_LINKS = 40  # as many as Linux follows


def overlap(target: Path, source: Path) -> bool:
    """Return whether an output at `target` would replace `source`, a file of it or a folder around it, or lie in it."""
    if source.is_dir() and _identity(source) in _around(target):
        return True
    wanted = _identity(target)
    if wanted is None:
        return False
    if wanted in _around(source):
        return True
    return any(
        wanted == _identity(file) or (file.is_symlink() and wanted in _around(file)) for file in _files_of(source)
    )


def _identity(path: Path) -> Identity | None:
    """Return device and number of what stands at a path, links followed; None where nothing does."""
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _around(path: Path) -> set[Identity]:
    """Return the folders that a path lies in, and those of what it links to, link after link."""
    folders = [place.parent.resolve() for place in _links(path.absolute())]
    found = {_identity(each) for folder in folders for each in (folder, *folder.parents)}
    return {identity for identity in found if identity is not None}


def _links(path: Path) -> Iterator[Path]:
    """Yield a path, and where it is a link, what that names, and so on; a circle ends somewhere."""
    for _ in range(_MOST_LINKS):
        yield path
        if not path.is_symlink():
            return
        path = path.parent / path.readlink()


def _files_of(source: Path) -> Iterator[Path]:
    """Yield what an input is read from: shards may be links to elsewhere, as in the cache of the Hugging Face hub.

    Of folders within a folder, such as a step of DeepSpeed's, only links need a look: the others lie in the source.
    """
    yield source
    if source.is_dir():
        for child in _children(source):
            yield child
            if child.is_dir():
                yield from _children(child)
    elif INDEX.fullmatch(source.name):
        yield from (source.parent / name for name in shard_names(source))


def _children(folder: Path) -> Iterable[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder)]
    except OSError:
        return ()
