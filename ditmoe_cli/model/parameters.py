"""The parameters of a checkpoint: their count, and the group that each weight belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ditmoe_cli.files.header import FLOATING, TensorInfo
from ditmoe_cli.files.names import SHARED, split_name
from ditmoe_cli.model.checkpoint import Checkpoint

WeightGroup = Literal["experts", "shared", "attn", "modulation", "embedders"]


@dataclass(frozen=True)
class ParameterCounts:
    """The number of parameters: in total, used per token (activated), and in routed experts."""

    total: int
    activated: int
    routed: int


def count_parameters(checkpoint: Checkpoint) -> ParameterCounts:
    """Count parameters by the logical shapes of the weights.

    Activated parameters are all but those of routed experts, plus those of the top-k experts of each block (the widest,
    where widths differ). The label table counts whole, as in the paper's table 1.
    """
    config = checkpoint.config
    floating = [w.info for w in checkpoint.weights.values() if w.info.dtype in FLOATING]
    total = sum(info.numel for info in floating)
    routed = sum(info.numel for info in floating if split_name(info.name).expert is not None)
    used = sum(
        3 * config.hidden_size * width
        for block in config.blocks
        for width in sorted(block.expert_widths)[-config.top_k :]
    )
    return ParameterCounts(total, total - routed + used, routed)


def weight_group(info: TensorInfo) -> WeightGroup | None:
    """Return the group of a weight that quantisation may change; None for other weights.

    Router, patch, label and position embedding, norms and biases are never quantised.
    """
    return group_of(info.name) if len(info.shape) == 2 else None


def group_of(name: str) -> WeightGroup | None:
    """Return the group of the matrix `name`; None for weights that are never quantised."""
    parts = split_name(name)
    if not parts.rest.endswith(".weight"):
        return None
    if parts.expert is not None:
        return "experts"
    groups: Mapping[str, WeightGroup]
    if parts.block is None:
        groups = {"t_embedder.mlp.": "embedders", "final_layer.linear.": "embedders", "final_layer.adaLN": "modulation"}
    else:
        groups = {f"{SHARED}.": "shared", "attn.": "attn", "adaLN_modulation.": "modulation"}
    return next((group for start, group in groups.items() if parts.rest.startswith(start)), None)


def is_compressible(info: TensorInfo) -> bool:
    """Return whether quantisation may change a weight."""
    return weight_group(info) is not None
