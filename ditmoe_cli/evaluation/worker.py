"""One process that samples or extracts: its device, its share of the images, and where it reports to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ditmoe_cli.processes import Share

Notify = Callable[[str], None]
"""Takes a message for the user."""


@dataclass(frozen=True)
class Runtime:
    """Device, images a batch, and how the model is sped up; none changes an image beyond rounding."""

    device: str = "cpu"
    batch: int = 64
    compiled: bool = False
    graphs: bool | None = None


@dataclass(frozen=True)
class Worker:
    """A process at work: runtime, share of the images, and messages."""

    runtime: Runtime
    share: Share
    notify: Notify
