"""Where files are kept that another run may need again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """Return a folder under ``$XDG_CACHE_HOME/ditmoe``, else ``~/.cache/ditmoe``; it need not exist."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache").joinpath("ditmoe", *parts)
