"""Which weights smoothing changes. Torch-free, so that planned outputs can tell what is computed."""

from __future__ import annotations

from ditmoe_cli.compression.plan import Formats
from ditmoe_cli.files.names import CONSTANTS_DOWN, RESIDUAL_LINEAR, ROUTER, SHARED, split_name
from ditmoe_cli.model.opened import Checkpoint

_ADALN = ("adaLN_modulation.1.weight", "adaLN_modulation.1.bias")
ENTERED = ("gate_proj", "up_proj")  # matrices of an expert that read the mixture's inputs


def smoothed_names(checkpoint: Checkpoint, stage: Formats, block: int) -> list[str]:
    """Return the weights of a block that smoothing changes and that get no format."""
    own = (name for name in checkpoint.weights if split_name(name).block == block)
    return [name for name in own if name not in stage.formats and is_smoothed(stage, name)]


def is_smoothed(stage: Formats, name: str) -> bool:
    """Tell whether smoothing changes a weight: one that makes a mixture's inputs, or one that reads them."""
    if stage.rounding is None or not stage.rounding.smoothing:
        return False
    parts = split_name(name)
    entered = [f"{matrix}.weight" for matrix in ENTERED]
    if parts.expert is not None:
        return parts.rest in entered
    shared = {f"{SHARED}.{name}" for name in entered}
    return parts.block is not None and parts.rest in {*_ADALN, ROUTER, RESIDUAL_LINEAR, CONSTANTS_DOWN, *shared}
