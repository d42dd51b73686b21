"""What commands have in common with the machine: threads, and the versions of what computes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from ditmoe_cli import __version__
from ditmoe_cli.threads import use_threads

_MOST_THREADS = max(256, os.cpu_count() or 1)  # a system refuses to start more, and ends the process for asking
_DRIVER = Path("/proc/driver/nvidia/version")


def thread_count(count: int) -> int:
    """Return a number of threads. Raises `ValueError` where there cannot be so many."""
    if not 1 <= count <= _MOST_THREADS:
        raise ValueError(f"give 1 to {_MOST_THREADS}")
    return count


@dataclass(frozen=True)
class Threads:
    """How many threads compute: an option of every command."""

    panel: ClassVar[str] = "Machine"

    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            callback=thread_count,
            help="Threads to compute with; rounding may depend on their number. [default: the cores that this process "
            "may use]",
        ),
    ] = None

    def apply(self) -> None:
        """Use that many threads, where a number was given."""
        if self.threads is not None:
            use_threads(self.threads, os.environ)


def versions() -> str:
    """Return the versions of ditmoe, torch and the GPU's driver in a line each, without importing torch."""
    from importlib import metadata  # takes as long as all the rest of --help

    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "not installed"
    return f"ditmoe {__version__}\ntorch {torch}\n{gpu_driver()}"


def gpu_driver(file: Path = _DRIVER) -> str:
    """Return the version of the GPU's driver, as the driver states it."""
    try:
        words = file.read_text(errors="replace").split()
    except OSError:
        return "no GPU found"
    version = next((word for word in words if word[:1].isdigit() and "." in word), "of unknown version")
    return f"NVIDIA driver {version}"
