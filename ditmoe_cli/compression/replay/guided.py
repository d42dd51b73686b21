"""Calibration states in all guidance branches, and errors of the guided prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.replay.states import States, calibration_states
from ditmoe_cli.compression.working_sizes import (
    FEWEST_SENT,
    FEWEST_STATES,
    MEASURED_TOKENS,
    REPLAYED_TOKENS,
    SENT_TOKENS,
)
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

    def spread(self, tokens: int, patches: int, fewest: int) -> Tensor:
        """Return the rows, in all branches, of states with about so many tokens together, `patches` in each.

        Their times lie at evenly spaced ranks, since errors depend on the time more than on the image.
        """
        total = len(self.z) // self.branches
        count = min(max(tokens // (patches * self.branches), fewest), total)
        ranks = (2 * torch.arange(count) + 1) * total // (2 * count)
        chosen = self.t[:total].argsort(stable=True)[ranks.to(self.t.device)].sort().values
        return torch.cat([chosen + branch * total for branch in range(self.branches)])

    def at(self, rows: Tensor) -> GuidedStates:
        """Return the states at rows of all branches."""
        return replace(self, z=self.z[rows], t=self.t[rows], labels=self.labels[rows])

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

    def energy(self, difference: Tensor) -> Tensor:
        """Return the mean of ‖s d_c - (s - 1) d_u‖² over the guided tokens of a stream's difference d (rows, P, D).

        A number in double precision on the device of the difference.
        """
        scaled = zip(self.coefficients, difference.chunk(self.branches), strict=True)
        total = torch.stack([scale * part for scale, part in scaled]).sum(dim=0)
        return total.square_().sum(dim=2).mean(dtype=torch.float64)


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


def replayed_states(calibrated: Calibrated, model: OffloadedDiTMoE) -> GuidedStates:
    """Return those of `measured_states` that formats are replayed on, with about `REPLAYED_TOKENS` tokens."""
    states = measured_states(calibrated, model)
    return states.at(states.spread(REPLAYED_TOKENS, model.config.num_patches, FEWEST_STATES))


def sent_rows(states: GuidedStates, model: OffloadedDiTMoE) -> Tensor:
    """Return the rows of the states that formats of attention and modulation are tried on, and whole mixes."""
    return states.spread(SENT_TOKENS, model.config.num_patches, FEWEST_SENT)


def image_slices(total: int) -> list[slice]:
    """Return slices of `total` images, as many as pass a block at a time."""
    return [slice(start, min(start + _IMAGES, total)) for start in range(0, total, _IMAGES)]
