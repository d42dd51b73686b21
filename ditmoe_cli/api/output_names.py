"""Sizes as people write them, and the names of outputs and profiles where none are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ditmoe_cli.files.hub_names import told_name
from ditmoe_cli.files.writer import DEFAULT_SHARD_BYTES
from ditmoe_cli.model.checkpoint import Checkpoint

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Size:
    """A number of bytes, and the text that it was given as, such as ``5GB``."""

    text: str
    bytes: int


DEFAULT_SHARD = Size("10GB", DEFAULT_SHARD_BYTES)
"""The largest file of a folder, where nothing else is asked for."""


def parse_size(text: str) -> Size:
    """Return the size that is written as ``5GB`` or ``2.5GiB``. Raises `ValueError`."""
    cleaned = text.strip().upper()
    unit = next((u for u in sorted(_UNITS, key=len, reverse=True) if cleaned.endswith(u)), None)
    try:
        size = int(float(cleaned.removesuffix(unit or "").removesuffix("B")) * (_UNITS[unit] if unit else 1))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError("give a size such as 5GB, 500MB or 2.5GiB")
    return Size(text, size)


def stem(path: Path) -> str:
    """Return the name of a file or folder without the ending of its format; outputs are named after it."""
    name = told_name(path)
    for ending in (".safetensors.index.json", ".safetensors", ".pth", ".pt", ".ckpt", ".bin"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name


def default_output(checkpoint: Path, suffix: str) -> Path:
    """Return the default output in the working directory: ``NAME.SUFFIX.safetensors``."""
    return Path(f"{stem(checkpoint)}.{suffix}.safetensors")


def usual_profiles(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Return where ``ditmoe profile-experts`` puts a checkpoint's profile: the working folder, and beside the file."""
    name = default_output(checkpoint.path, "profile").name
    return tuple(dict.fromkeys((Path(name).absolute(), checkpoint.path.absolute().parent / name)))
