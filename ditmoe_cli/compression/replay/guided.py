"""States as a model is given them, and errors as they count under guidance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.replay.states import States
from ditmoe_cli.diffusion.guidance import combine
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.offload import OffloadedDiTMoE

_ROWS = 64  # images that go through a block at once


@dataclass(frozen=True)
class Conditions:
    """States as a model is given them, all branches, conditional first."""

    z: Tensor
    t: Tensor
    labels: Tensor
    branches: int
    cfg: float
    sampler: Sampler

    @property
    def coefficients(self) -> tuple[float, ...]:
        """What each branch weighs in the guided sum: s and -(s - 1)."""
        return (1.0,) if self.branches == 1 else (self.cfg, 1.0 - self.cfg)

    def first(self, states: int) -> Conditions:
        """Return the first `states` of them."""
        z, t, labels = (_rows_of(part, self.branches, states) for part in (self.z, self.t, self.labels))
        return Conditions(z, t, labels, self.branches, self.cfg, self.sampler)

    def guided(self, output: Tensor) -> Tensor:
        """Return the guided prediction (N, C, S, S), without a learned variance, of both branches' outputs."""
        output = output[:, : self.z.shape[1]].float()
        if self.branches == 1:
            return output
        cond, uncond = output.chunk(2)
        return combine(cond, uncond, self.cfg, self.sampler)

    def predicted(self, model: OffloadedDiTMoE, x: Tensor, c: Tensor) -> Tensor:
        """Return the guided prediction for tokens x (N, P, D) that have passed all blocks under conditions c (N, D)."""
        return self.guided(torch.cat([model.unembed(x[rows], c[rows]) for rows in slices(len(x))]))

    def energy(self, stream: Tensor) -> float:
        """Return Σ ‖s x_c - (s - 1) x_u‖² over the guided tokens of a stream's difference (N, P, D), a token."""
        parts = zip(self.coefficients, stream.chunk(self.branches), strict=True)
        total: Tensor = sum((scale * part for scale, part in parts), start=torch.zeros(()))
        return float(total.double().square().sum()) / (total.shape[0] * total.shape[1])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return Σ ‖found - wanted‖² / Σ ‖wanted‖²; 0 where nothing differs, also of a model that predicts 0."""
    error, scale = (float(part.double().square().sum()) for part in (found - wanted, wanted))
    if scale:
        return error / scale
    return math.inf if error else 0.0


def _rows_of(part: Tensor, branches: int, states: int) -> Tensor:
    """Return the rows of the first `states` states in every branch."""
    return torch.cat([each[:states] for each in part.chunk(branches)])


def conditions(model: OffloadedDiTMoE, states: States, spec: SampleSpec) -> Conditions:
    """Return states in all branches that `spec` samples with."""
    branches = len(states.branch_weights)
    null = torch.full_like(states.labels, model.config.num_classes)
    labels = torch.cat([states.labels, null][:branches])
    z, t = (torch.cat([part] * branches) for part in (states.z, states.t))
    device = model.device
    return Conditions(z.to(device), t.to(device), labels.to(device), branches, spec.cfg, model.config.sampler)


def slices(total: int) -> Iterator[slice]:
    """Yield slices of some images at a time."""
    return (slice(start, min(start + _ROWS, total)) for start in range(0, total, _ROWS))
