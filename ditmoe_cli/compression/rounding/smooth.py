"""Smoothing as in EAQuant (https://arxiv.org/abs/2506.13329): input channels of a mixture scaled before rounding.

A channel whose inputs are large is multiplied into the weights that read it, so that rounding spares it, and divided
out of the inputs. Here that is exact and free: the mixture's inputs are LayerNorm(x) (1 + s) + b with s and b from
adaLN and no affine of their own, so for scales σ (D,)

    rows of s:  W / σ, bias (bias + 1) / σ - 1        rows of b:  W / σ, bias / σ
    columns of router, gate, up and of what else reads the inputs: W · σ

leave the mixture's output as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ditmoe_cli.compression.rounding.smoothed import ENTERED
from ditmoe_cli.model.dit import Block

_SHIFT, _SCALE = 3, 4  # parts of adaLN that make the mixture's inputs


def channel_scales(largest: Sequence[Tensor], weights: Sequence[Tensor], alpha: float) -> Tensor:
    """Return σ_j = max_e (max |x_j^e|^α / max_i |W_ij^e|^(1 - α)) over layers e, divided by its geometric mean.

    Args:
        largest: max |x_j| (D,) of the inputs that each layer has seen; 0 where it saw none.
        weights: W (out, D) of each layer.
        alpha: 0 for the weights alone, 1 for the inputs alone.

    Channels without any input or weight keep 1.
    """
    scales = torch.stack(
        [
            seen.double().pow(alpha) / weight.abs().amax(dim=0).double().pow(1 - alpha)
            for seen, weight in zip(largest, weights, strict=True)
        ]
    )
    sigma = scales.nan_to_num(0.0, 0.0, 0.0).amax(dim=0)
    used = sigma > 0
    if not bool(used.any()):
        return torch.ones_like(sigma, dtype=torch.float32)
    mean = sigma[used].log().mean().exp()
    return torch.where(used, sigma / mean, 1.0).float()


def block_scales(block: Block, largest: Tensor, alpha: float) -> Tensor:
    """Return a block's σ (D,): over its experts and, on any expert's inputs, the shared expert and the router.

    `largest` (E, D) is the largest |u| that each expert has seen.
    """
    every = largest.amax(dim=0)
    seen = [*largest[: len(block.moe.experts)], every, every]
    entered = [torch.cat([e.get_parameter(f"{m}.weight") for m in ENTERED]) for e in _experts(block)]
    return channel_scales([each.to(every.device) for each in seen], [*entered, block.moe.gate.weight], alpha)


def smooth_inputs(block: Block, sigma: Tensor) -> None:
    """Fold σ (D,) into a block's adaLN and into all that reads its mixture's inputs, in place."""
    layer, width = block.adaLN_modulation[1], len(sigma)
    assert isinstance(layer, nn.Linear)
    for part, offset in ((_SHIFT, 0.0), (_SCALE, 1.0)):
        rows = slice(part * width, (part + 1) * width)
        layer.weight.data[rows] /= sigma.unsqueeze(1)
        layer.bias.data[rows] = (layer.bias.data[rows] + offset) / sigma - offset
    moe = block.moe
    readers = [
        moe.gate.weight,
        *(e.get_parameter(f"{m}.weight") for e in _experts(block) for m in ENTERED),
    ]
    for weight in (*readers, moe.residual_linear, moe.constants_down):
        if weight is not None:
            weight.data *= sigma


def _experts(block: Block) -> list[nn.Module]:
    return [*block.moe.experts, block.moe.shared_experts]
