"""What the tests of rounding share: guided predictions written out, and models with layers rounded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ditmoe_cli.compression.replay.rounded_layers import nearest
from ditmoe_cli.compression.replay.states import States, calibration_states
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.routing.calibration_settings import profiled_spec
from ditmoe_cli.routing.profile import RoutingProfile


def states_for(checkpoint: Checkpoint, profile: RoutingProfile, tokens: int) -> tuple[States, float]:
    """The states that take `tokens` tokens with all branches, and the guidance scale."""
    spec = profiled_spec(profile.calibration, checkpoint)
    branches = 1 if spec.cfg == 1.0 else 2
    wanted = max(tokens // (checkpoint.config.num_patches * branches), 16)
    return calibration_states(profile, spec, wanted), spec.cfg


def guided_by_hand(model: DiTMoE, states: States, cfg: float) -> Tensor:
    """The guided prediction, of the channels that are sampled with: all, or the first three of DDPM."""
    null = torch.full_like(states.labels, model.config.num_classes)
    channels = states.z.shape[1]
    with torch.no_grad():
        cond, uncond = (model(states.z, states.t, y)[:, :channels].double() for y in (states.labels, null))
    guided = uncond + cfg * (cond - uncond)
    if model.config.sampler == "ddpm":
        guided[:, 3:] = cond[:, 3:]
    return guided


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


def with_rounded(model: DiTMoE, formats: Mapping[str, str]) -> DiTMoE:
    """The model with weights rounded in place."""
    for name, fmt in formats.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.weight.copy_(nearest(layer.weight, fmt))  # type: ignore[operator, arg-type]
    return model
