"""Guidance of both families of weights: classifier-free (https://arxiv.org/abs/2207.12598), and by a weaker model.

guided = uncond + s (cond - uncond) + W (cond - weak), where weak is the conditional branch of a weaker model
(`weak_guidance`). Rectified-flow weights are guided on all channels of the velocity; DDPM weights, as in upstream's
``forward_with_cfg``, on the first three channels of the noise alone: the fourth latent channel and the learned variance
are those of the conditional branch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditmoe_cli.diffusion.predictor import Predictor
from ditmoe_cli.diffusion.schedule import check_guidance
from ditmoe_cli.diffusion.watchers import UNWATCHED, Watchers
from ditmoe_cli.diffusion.weak_guidance import Guidance
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dit import Denoiser, Prediction

DDPM_GUIDED_CHANNELS = 3


def combine(cond: Tensor, uncond: Tensor, scale: float, sampler: Sampler) -> Tensor:
    """Return the guided output from the outputs of both branches (N, C, H, W)."""
    guided = guided_channels(cond.shape[1], sampler)
    head = uncond[:, :guided] + scale * (cond[:, :guided] - uncond[:, :guided])
    return torch.cat((head, cond[:, guided:]), dim=1)


def away_from_weak(output: Tensor, cond: Tensor, weak: Tensor, scale: float, sampler: Sampler) -> Tensor:
    """Return output + W (cond - weak) for W = `scale`, all (N, C, H, W); `output` may be guided by the null class."""
    guided = guided_channels(cond.shape[1], sampler)
    head = output[:, :guided] + scale * (cond[:, :guided] - weak[:, :guided])
    return torch.cat((head, output[:, guided:]), dim=1)


def guided_channels(channels: int, sampler: Sampler) -> int:
    """Return how many of the channels are guided, the first ones."""
    return channels if sampler == "rf" else min(channels, DDPM_GUIDED_CHANNELS)


class _Announced:
    """A model for images of `labels`, prepared for all announced times at once, and for others one by one."""

    def __init__(self, model: Denoiser, labels: Tensor, times: Sequence[float]) -> None:
        self._model, self._labels, self._times = model, labels, list(times)
        self._prepared: tuple[set[float], Prediction] | None = None

    def at(self, t: float) -> Prediction:
        """Return the model prepared for time t."""
        if self._prepared is None or t not in self._prepared[0]:
            asked = self._times if t in self._times else [t]
            self._prepared = set(asked), self._model.prepared(asked, self._labels)
        return self._prepared[1]


def guided_predictor(
    model: Denoiser,
    labels: Tensor,
    guidance: Guidance,
    watchers: Watchers = UNWATCHED,
    times: Sequence[float] = (),
    weak: Denoiser | None = None,
) -> Predictor:
    """Return a predictor for images with `labels` (N,), which may be asked at all `times`, and others.

    Where the null class guides, both branches run in one batch, conditional first; where it does not
    (https://arxiv.org/abs/2404.07724), the conditional branch alone. `weak` is the weaker model of ``guidance.guide``,
    which predicts the conditional branch where that guides; watchers are not shown its blocks.

    Raises `UsageError` as `check_guidance` does, and `ValueError` for a guide without its model.
    """
    check_guidance(guidance.scale, model.config)
    guide = guidance.guide
    if guide is not None and guide.scale != 0.0 and weak is None:
        raise ValueError(f"guided by {guide.model}, whose model is not given")
    distinct = list(dict.fromkeys(times))
    doubled = [t for t in distinct if guidance.takes_null_class(t)]
    single = [t for t in distinct if not guidance.takes_null_class(t)]
    alone = _Announced(model, labels, single)
    both = _Announced(model, torch.cat((labels, torch.full_like(labels, model.config.num_classes))), doubled)
    weaker = _Announced(weak or model, labels, [t for t in distinct if guidance.takes_weak(t)])

    def predict(x: Tensor, t: float) -> Tensor:
        if watchers.on_step is not None:
            watchers.on_step(x, t)
        if guidance.takes_null_class(t):
            cond, uncond = both.at(t)(torch.cat((x, x)), t, watchers.observer).float().chunk(2)
            output = combine(cond, uncond, guidance.scale, guidance.family)
        else:
            output = cond = alone.at(t)(x, t, watchers.observer).float()
        if guide is None or not guidance.takes_weak(t):
            return output
        return away_from_weak(output, cond, weaker.at(t)(x, t).float(), guide.scale, guidance.family)

    return predict
