"""Classifier-free guidance of both families of weights (https://arxiv.org/abs/2207.12598).

guided = uncond + s (cond - uncond). Rectified-flow weights are guided on all channels of the velocity; DDPM weights, as
in upstream's ``forward_with_cfg``, on the first three channels of the noise alone: the fourth latent channel and the
learned variance are those of the conditional branch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditmoe_cli.diffusion.predictor import Predictor
from ditmoe_cli.diffusion.schedule import ALWAYS, Interval, check_guidance, is_guided
from ditmoe_cli.diffusion.watchers import UNWATCHED, Watchers
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dit import Denoiser

DDPM_GUIDED_CHANNELS = 3


def combine(cond: Tensor, uncond: Tensor, scale: float, sampler: Sampler) -> Tensor:
    """Return the guided output from the outputs of both branches (N, C, H, W)."""
    guided = cond.shape[1] if sampler == "rf" else DDPM_GUIDED_CHANNELS
    head = uncond[:, :guided] + scale * (cond[:, :guided] - uncond[:, :guided])
    return torch.cat((head, cond[:, guided:]), dim=1)


def guided_predictor(
    model: Denoiser,
    labels: Tensor,
    scale: float,
    sampler: Sampler,
    interval: Interval = ALWAYS,
    watchers: Watchers = UNWATCHED,
) -> Predictor:
    """Return a predictor for images with `labels` (N,).

    At scale 1, and at noise levels outside `interval` (https://arxiv.org/abs/2404.07724), only the conditional branch
    is computed; otherwise both run in one batch, conditional first. Raises `UsageError` as `check_guidance` does.
    """
    check_guidance(scale, model.config)
    null = torch.full_like(labels, model.config.num_classes)

    def predict(x: Tensor, t: float) -> Tensor:
        if watchers.on_step is not None:
            watchers.on_step(x, t)
        times = torch.full((len(x),), t, device=x.device)
        if not is_guided(t, scale, sampler, interval):
            plain: Tensor = model(x, times, labels, watchers.observer)
            return plain.float()
        both: Tensor = model(torch.cat((x, x)), torch.cat((times, times)), torch.cat((labels, null)), watchers.observer)
        cond, uncond = both.float().chunk(2)
        return combine(cond, uncond, scale, sampler)

    return predict
