"""Names of files, which may be any bytes, for libraries that take text only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def utf8_name(path: Path, unlike: str = ".") -> Iterator[str]:
    """Yield a name in UTF-8 of a file that is to be opened for reading while the context lasts.

    It is that of `path`, or else the number under which the system knows the opened file; so too where the name ends in
    `unlike`, by which a library would take the file for another kind. Raises `OSError` where that cannot be opened.
    """
    if _is_utf8(str(path)) and not str(path).endswith(unlike):
        yield str(path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False
