"""ditmoe: profile, prune, quantise, re-sample and score pretrained DiT-MoE checkpoints.

Importing this package costs nothing; `load_model` and `open_checkpoint` bring in torch when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditmoe_cli.version import __version__

if TYPE_CHECKING:
    from ditmoe_cli.model.checkpoint import open_checkpoint
    from ditmoe_cli.model.loading import load_model

__all__ = ["__version__", "load_model", "open_checkpoint"]


def __getattr__(name: str) -> object:
    if name == "load_model":
        from ditmoe_cli.model.loading import load_model

        return load_model
    if name == "open_checkpoint":
        from ditmoe_cli.model.checkpoint import open_checkpoint

        return open_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
