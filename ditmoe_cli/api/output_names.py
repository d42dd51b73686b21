"""Sizes as people write them, and the names of outputs and profiles where none are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ditmoe_cli.api.argument_checks import refuse_idle
from ditmoe_cli.errors import UsageError
from ditmoe_cli.files.hub_names import told_name
from ditmoe_cli.files.writer import DEFAULT_SHARD_BYTES, Output
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


def checkpoint_path(path: str | Path) -> Path:
    """Return where a checkpoint is written. Raises `ValueError` for an ending that we do not write."""
    path = Path(path)
    is_slip = path.suffix.startswith(".safe") and path.suffix != ".safetensors"
    if is_slip or path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".npz", ".json"):
        raise ValueError("checkpoints are written as FILE.safetensors or into a folder; other layouts by ditmoe export")
    return path


@dataclass(frozen=True)
class Destination:
    """Where a checkpoint goes."""

    output: Path | None = None
    force: bool = False
    dry_run: bool = False
    max_shard_size: Size = DEFAULT_SHARD

    def at(self, checkpoint: Path, suffix: str) -> Output:
        """Return the output; where no path is given, it is named after the input and `suffix`."""
        path = self.output or default_output(checkpoint, suffix)
        output = Output(path.absolute(), self.force, self.max_shard_size.bytes)
        if output.is_file:
            refuse_idle(self, "on a single file; give a folder as ⟨output⟩", "max_shard_size")
        return output


def destination(output: str | Path | None, force: bool, max_shard_size: int | str) -> Destination:
    """Return where a checkpoint goes. Raises `UsageError` for a size that is none."""
    shard = size_of("max_shard_size", max_shard_size) or DEFAULT_SHARD
    return Destination(None if output is None else Path(output), force, max_shard_size=shard)


def size_of(name: str, size: int | str | None) -> Size | None:
    """Return the size that an argument gives in bytes, or as ``5GB``; None for none. Raises `UsageError`."""
    if size is None:
        return None
    try:
        return parse_size(f"{size}B" if isinstance(size, int) else size)
    except ValueError as error:
        raise UsageError(f"⟨{name}⟩ {size}: {error}") from None


@dataclass(frozen=True)
class FileDestination:
    """Where a single safetensors file goes."""

    output: Path | None = None
    force: bool = False

    def at(self, checkpoint: Path, suffix: str) -> Path:
        """Return the file; without ⟨output⟩ it is named after the input and `suffix`."""
        return self.output or default_output(checkpoint, suffix)
