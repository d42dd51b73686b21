"""The cache folder, for files that a later run may use again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """Return a folder under ``$XDG_CACHE_HOME/ditmoe``, by default ``~/.cache/ditmoe``, without creating it."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache").joinpath("ditmoe", *parts)
