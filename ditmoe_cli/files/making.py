"""What made a result, as its history keeps it: versions, threads and device, by which results round. Torch-free.

Texts are of one width each, so that the bytes of a file are known before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping

from ditmoe_cli.files.cache import torch_version
from ditmoe_cli.threads import usable_threads
from ditmoe_cli.version import __version__

_COUNT, _NAME = 3, 4  # characters of a number, and of a device's or a dtype's name


def written_here() -> dict[str, str]:
    """Return what made a result of copied and rounded weights: the version of this package."""
    return {"ditmoe": __version__}


def computed_here(device: str = "cpu", **training: object) -> dict[str, str]:
    """Return what made a result of computed weights: versions, threads and the kind of `device`.

    `training` names more that trained weights depend on, as ``dtype`` and ``processes``.
    """
    more = {name: str(value).rjust(_COUNT).ljust(_NAME) for name, value in training.items()}
    return {
        **written_here(),
        "torch": torch_version(),
        "threads": str(usable_threads()).rjust(_COUNT),
        "device": device.partition(":")[0].ljust(_NAME),
        **more,
    }


def told_making(made: Mapping[str, str]) -> dict[str, str]:
    """Return what made a result without the spaces that give all texts one width."""
    return {name: text.strip() for name, text in made.items()}
