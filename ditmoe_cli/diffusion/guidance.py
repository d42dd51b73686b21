"""Classifier-free guidance (https://arxiv.org/abs/2207.12598), each checkpoint family's way.

guided = uncond + s (cond - uncond). Rectified-flow checkpoints guide all channels of the velocity; DDPM ones
guide the first three channels only, as upstream's ``forward_with_cfg`` does, and keep the conditional rest
(the fourth latent channel of the noise, and the learned variance).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ditmoe_cli.diffusion.schedule import ALWAYS, Interval, is_guided
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dit import Denoiser
from ditmoe_cli.model.moe import Observer

DDPM_GUIDED_CHANNELS = 3


class Predictor(Protocol):
    """Predicts a model's guided output for images x (N, C, H, W) at one time for all."""

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Return (N, out_channels, H, W), in fp32."""


def combine(cond: Tensor, uncond: Tensor, scale: float, sampler: Sampler) -> Tensor:
    """Return the guided output of one family from both branches' outputs (N, C, H, W)."""
    guided = cond.shape[1] if sampler == "rf" else DDPM_GUIDED_CHANNELS
    head = uncond[:, :guided] + scale * (cond[:, :guided] - uncond[:, :guided])
    return torch.cat((head, cond[:, guided:]), dim=1)


def guided_predictor(
    model: Denoiser,
    labels: Tensor,
    scale: float,
    sampler: Sampler,
    observer: Observer | None = None,
    on_step: Callable[[Tensor, float], None] | None = None,
    interval: Interval = ALWAYS,
) -> Predictor:
    """Return a predictor for images with `labels` (N,).

    At scale 1, and at noise levels outside `interval` (https://arxiv.org/abs/2404.07724), only the conditional branch
    is computed; otherwise both run in one batch, conditional first. `on_step(x, t)` is called before each prediction,
    `observer` by every block during it.
    """
    null = torch.full_like(labels, model.config.num_classes)

    def predict(x: Tensor, t: float) -> Tensor:
        if on_step is not None:
            on_step(x, t)
        times = torch.full((len(x),), t, device=x.device)
        if not is_guided(t, scale, sampler, interval):
            plain: Tensor = model(x, times, labels, observer)
            return plain.float()
        both: Tensor = model(torch.cat((x, x)), torch.cat((times, times)), torch.cat((labels, null)), observer)
        cond, uncond = both.float().chunk(2)
        return combine(cond, uncond, scale, sampler)

    return predict
