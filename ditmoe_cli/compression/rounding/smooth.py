"""Smoothing as in EAQuant (https://arxiv.org/abs/2506.13329): input channels of a mixture scaled before rounding.

The inputs of a channel are divided by its scale and the weights that read it multiplied by it, so that channels of
large inputs are rounded more finely. Here that is exact and free: the mixture's inputs are LayerNorm(x) (1 + s) + b
with s and b from adaLN and no affine of their own, so for scales σ (D,)

    rows of s:  W / σ, bias (bias + 1) / σ - 1        rows of b:  W / σ, bias / σ
    columns of router, gate, up and of any other matrix that reads the inputs: W · σ

leave the mixture's output unchanged.

The names of changed weights are known from headers, so torch is imported only where weights are changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ditmoe_cli.compression.plan import Formats
from ditmoe_cli.files.names import CONSTANTS_DOWN, RESIDUAL_LINEAR, ROUTER, SHARED, split_name
from ditmoe_cli.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ditmoe_cli.model.dit import Block

_ADALN = ("adaLN_modulation.1.weight", "adaLN_modulation.1.bias")
_SHIFT, _SCALE = 3, 4  # parts of adaLN that make the mixture's inputs
_READING = ("gate_proj.weight", "up_proj.weight")  # matrices of an expert that read the mixture's inputs


def smoothed_names(checkpoint: Checkpoint, stage: Formats, block: int) -> list[str]:
    """Return the names of a block's weights that smoothing changes and that get no format."""
    of_block = (name for name in checkpoint.weights if split_name(name).block == block)
    return [name for name in of_block if name not in stage.formats and is_smoothed(stage, name)]


def is_smoothed(stage: Formats, name: str) -> bool:
    """Return whether a stage's smoothing changes a weight: one of adaLN, or one that reads a mixture's inputs."""
    if stage.rounding is None or not stage.rounding.smoothing:
        return False
    parts = split_name(name)
    if parts.expert is not None:
        return parts.rest in _READING
    shared = {f"{SHARED}.{matrix}" for matrix in _READING}
    return parts.block is not None and parts.rest in {*_ADALN, ROUTER, RESIDUAL_LINEAR, CONSTANTS_DOWN, *shared}


def channel_scales(largest: Sequence[Tensor], weights: Sequence[Tensor], alpha: float) -> Tensor:
    """Return σ_j = max_e (max |x_j^e|^α / max_i |W_ij^e|^(1 - α)) over layers e, divided by its geometric mean.

    Args:
        largest: max |x_j| (D,) of each layer's inputs; 0 for a layer without inputs.
        weights: W (out, D) of each layer.
        alpha: 0 for the weights alone, 1 for the inputs alone.

    Channels whose inputs or weights are all 0 get 1.
    """
    import torch

    scales = torch.stack(
        [
            inputs.double().pow(alpha) / weight.abs().amax(dim=0).double().pow(1 - alpha)
            for inputs, weight in zip(largest, weights, strict=True)
        ]
    )
    sigma = scales.nan_to_num(0.0, 0.0, 0.0).amax(dim=0)
    used = sigma > 0
    if not bool(used.any()):
        return torch.ones_like(sigma, dtype=torch.float32)
    mean = sigma[used].log().mean().exp()
    return torch.where(used, sigma / mean, 1.0).float()


def block_scales(block: Block, largest: Tensor, alpha: float) -> Tensor:
    """Return a block's σ (D,) over its experts, shared expert and router.

    `largest` (E, D) is the largest |u| of each expert's inputs; the shared expert and the router have the largest over
    all of them.
    """
    import torch

    of_all = largest.amax(dim=0)
    inputs = [*largest[: len(block.moe.experts)], of_all, of_all]
    readers = [torch.cat([expert.get_parameter(matrix) for matrix in _READING]) for expert in _experts(block)]
    return channel_scales([each.to(of_all.device) for each in inputs], [*readers, block.moe.gate.weight], alpha)


def smooth_inputs(block: Block, sigma: Tensor) -> None:
    """Fold σ (D,) into a block's adaLN and into all weights that read its mixture's inputs, in place.

    Formulas stand at the head of this module.
    """
    width = len(sigma)
    weight, bias = (block.get_parameter(name) for name in _ADALN)
    for part, offset in ((_SHIFT, 0.0), (_SCALE, 1.0)):
        rows = slice(part * width, (part + 1) * width)
        weight.data[rows] /= sigma.unsqueeze(1)
        bias.data[rows] = (bias.data[rows] + offset) / sigma - offset
    moe = block.moe
    matrices = [expert.get_parameter(matrix) for expert in _experts(block) for matrix in _READING]
    for reader in (moe.gate.weight, *matrices, moe.residual_linear, moe.constants_down):
        if reader is not None:
            reader.data *= sigma


def _experts(block: Block) -> list[nn.Module]:
    return [*block.moe.experts, block.moe.shared_experts]
