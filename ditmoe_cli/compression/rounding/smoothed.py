"""Which weights smoothing changes. Torch-free, so that planned outputs can tell what is computed."""

from __future__ import annotations

from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.files.names import CONSTANTS_DOWN, RESIDUAL_LINEAR, ROUTER, SHARED, split_name
from ditmoe_cli.model.opened import Checkpoint

_ADALN = ("adaLN_modulation.1.weight", "adaLN_modulation.1.bias")
ENTERED = ("gate_proj", "up_proj")  # matrices of an expert that read the mixture's inputs


def smoothed_names(checkpoint: Checkpoint, plan: CompressionPlan, block: int) -> list[str]:
    """Return the weights of a block that smoothing changes and that are written as they are, in no format."""
    if plan.rounding is None or not plan.rounding.smoothing:
        return []
    mine = (name for name in checkpoint.weights if split_name(name).block == block)
    return [name for name in mine if name not in plan.formats and is_smoothed(name)]


def is_smoothed(name: str) -> bool:
    """Tell whether smoothing changes a weight: what makes a mixture's inputs, and what reads them."""
    parts = split_name(name)
    entered = [f"{matrix}.weight" for matrix in ENTERED]
    if parts.expert is not None:
        return parts.rest in entered
    shared = {f"{SHARED}.{name}" for name in entered}
    return parts.block is not None and parts.rest in {*_ADALN, ROUTER, RESIDUAL_LINEAR, CONSTANTS_DOWN, *shared}
