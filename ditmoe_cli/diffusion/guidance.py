"""Classifier-free guidance of both families of weights (https://arxiv.org/abs/2207.12598).

guided = uncond + s (cond - uncond). Rectified-flow weights are guided on all channels of the velocity; DDPM weights, as
in upstream's ``forward_with_cfg``, on the first three channels of the noise alone: the fourth latent channel and the
learned variance are those of the conditional branch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditmoe_cli.diffusion.predictor import Predictor
from ditmoe_cli.diffusion.schedule import ALWAYS, Interval, check_guidance, is_guided
from ditmoe_cli.diffusion.watchers import UNWATCHED, Watchers
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dit import Denoiser, Prediction

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
    times: Sequence[float] = (),
) -> Predictor:
    """Return a predictor for images with `labels` (N,), which may be asked at all `times`, and others.

    At scale 1, and at noise levels outside `interval` (https://arxiv.org/abs/2404.07724), only the conditional branch
    is computed; otherwise both run in one batch, conditional first. Raises `UsageError` as `check_guidance` does.
    """
    check_guidance(scale, model.config)
    both = torch.cat((labels, torch.full_like(labels, model.config.num_classes)))
    announced: dict[bool, list[float]] = {False: [], True: []}
    for time in dict.fromkeys(times):
        announced[is_guided(time, scale, sampler, interval)].append(time)
    prepared: dict[bool, tuple[set[float], Prediction]] = {}

    def prediction(t: float, is_double: bool) -> Prediction:
        if is_double not in prepared or t not in prepared[is_double][0]:
            asked = announced[is_double] if t in announced[is_double] else [t]
            prepared[is_double] = set(asked), model.prepared(asked, both if is_double else labels)
        return prepared[is_double][1]

    def predict(x: Tensor, t: float) -> Tensor:
        if watchers.on_step is not None:
            watchers.on_step(x, t)
        if not is_guided(t, scale, sampler, interval):
            return prediction(t, False)(x, t, watchers.observer).float()
        cond, uncond = prediction(t, True)(torch.cat((x, x)), t, watchers.observer).float().chunk(2)
        return combine(cond, uncond, scale, sampler)

    return predict
