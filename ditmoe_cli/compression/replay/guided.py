"""Calibration states in all guidance branches, and errors of the guided prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.replay.states import States, calibration_states
from ditmoe_cli.compression.working_sizes import FEWEST_STATES, MEASURED_TOKENS
from ditmoe_cli.diffusion.guidance import combine
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.routing.calibration_settings import profiled_spec

_IMAGES = 64  # images that pass a block at a time


@dataclass(frozen=True)
class GuidedStates:
    """States in all branches, the conditional one first: N states have N rows or, under guidance, 2 N.

    Attributes:
        z: (rows, C, S, S) noisy images.
        t: (rows,) times.
        labels: (rows,) classes, the null class in the unconditional branch.
        branches: 2 under guidance, else 1.
        cfg: guidance scale s.
        sampler: sampler family, which decides the channels that are guided.
    """

    z: Tensor
    t: Tensor
    labels: Tensor
    branches: int
    cfg: float
    sampler: Sampler

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The factor of each branch in the guided sum: s and -(s - 1); 1 without guidance."""
        return (1.0,) if self.branches == 1 else (self.cfg, 1.0 - self.cfg)

    def first(self, states: int) -> GuidedStates:
        """Return the first `states` states in all branches."""
        z, t, labels = (_first_rows(part, self.branches, states) for part in (self.z, self.t, self.labels))
        return GuidedStates(z, t, labels, self.branches, self.cfg, self.sampler)

    def guided(self, output: Tensor) -> Tensor:
        """Return the guided prediction (N, C, S, S) from a model's outputs of all branches (rows, ...).

        A learned variance is left out.
        """
        output = output[:, : self.z.shape[1]].float()
        if self.branches == 1:
            return output
        cond, uncond = output.chunk(2)
        return combine(cond, uncond, self.cfg, self.sampler)

    def predicted(self, model: OffloadedDiTMoE, x: Tensor, c: Tensor) -> Tensor:
        """Return the guided prediction from tokens x (rows, P, D) behind all blocks and conditions c (rows, D)."""
        return self.guided(torch.cat([model.unembed(x[rows], c[rows]) for rows in image_slices(len(x))]))

    def energy(self, difference: Tensor) -> float:
        """Return the mean of ‖s d_c - (s - 1) d_u‖² over the guided tokens of a stream's difference d (rows, P, D)."""
        parts = zip(self.coefficients, difference.chunk(self.branches), strict=True)
        total: Tensor = sum((scale * part for scale, part in parts), start=torch.zeros(()))
        return float(total.double().square().sum()) / (total.shape[0] * total.shape[1])


def in_branches(states: States, model: OffloadedDiTMoE) -> GuidedStates:
    """Return states in all their branches, on the model's device."""
    null = torch.full_like(states.labels, model.config.num_classes)
    labels = torch.cat([states.labels, null][: states.branches])
    z, t = (torch.cat([part] * states.branches) for part in (states.z, states.t))
    return GuidedStates(
        z=z.to(model.device),
        t=t.to(model.device),
        labels=labels.to(model.device),
        branches=states.branches,
        cfg=states.cfg,
        sampler=model.config.sampler,
    )


def measured_states(calibrated: Calibrated, model: OffloadedDiTMoE) -> GuidedStates:
    """Return the states that errors are measured on, about `MEASURED_TOKENS` tokens in all branches together.

    Raises `BadInputError` for a profile without states.
    """
    config = calibrated.checkpoint.config
    spec = profiled_spec(calibrated.profile.calibration, calibrated.checkpoint)
    branches = 1 if spec.cfg == 1.0 else 2
    wanted = max(MEASURED_TOKENS // (config.num_patches * branches), FEWEST_STATES)
    return in_branches(calibration_states(calibrated.profile, spec, wanted), model)


def image_slices(total: int) -> list[slice]:
    """Return slices of `total` images, as many as pass a block at a time."""
    return [slice(start, min(start + _IMAGES, total)) for start in range(0, total, _IMAGES)]


def _first_rows(part: Tensor, branches: int, states: int) -> Tensor:
    """Return the first `states` rows of each branch."""
    return torch.cat([each[:states] for each in part.chunk(branches)])
