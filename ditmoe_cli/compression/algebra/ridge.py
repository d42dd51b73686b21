"""Ridge regression from streamed normal equations, its strength chosen on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.progress import each

STRENGTHS = tuple(10.0**power for power in range(1, -8, -1))


@dataclass
class Normal:
    """Sums over rows (p, r) of weight w: Σ w p pᵀ (F, F), Σ w p rᵀ (F, D) and Σ w ‖r‖², in float64.

    They are all that the squared error of a linear map V (F, D) needs: Σ w ‖r - Vᵀp‖². Of the Gram the blocks below the
    diagonal are not kept: `whole` mirrors them.
    """

    gram: Tensor
    cross: Tensor
    energy: float = 0.0

    @classmethod
    def empty(cls, features: int, outputs: int, device: torch.device) -> Normal:
        """Return sums over no rows."""
        gram, cross = (torch.zeros(features, size, dtype=torch.float64, device=device) for size in (features, outputs))
        return cls(gram, cross)

    def add(self, parts: Sequence[Tensor], targets: Tensor, weights: Tensor) -> None:
        """Add rows: features in parts (n, F_i) side by side, targets (n, D), weights (n,).

        A part takes only the rows in which it is not all 0, as an expert's neurons are where it was not selected.
        """
        root = weights.sqrt().unsqueeze(1)
        scaled, r = [part * root for part in parts], targets * root
        self.energy += float(r.double().square().sum())
        start = 0
        for index, part in enumerate(scaled):
            used = part.any(dim=1)
            rows, stop = part[used], start + part.shape[1]
            beside = torch.cat([other[used] for other in scaled[index:]], dim=1)
            self.gram[start:stop, start:] += (rows.T @ beside).double()
            self.cross[start:stop] += (rows.T @ r[used]).double()
            start = stop

    @property
    def whole(self) -> Tensor:
        """The Gram with both triangles."""
        upper = self.gram.triu()
        return upper + upper.triu(1).T

    def __add__(self, other: Normal) -> Normal:
        """Return the sums over the rows of both."""
        return Normal(self.gram + other.gram, self.cross + other.cross, self.energy + other.energy)

    def error(self, solution: Tensor) -> float:
        """Return Σ w ‖r - Vᵀp‖² for V (F, D)."""
        quadratic = (solution * (self.whole @ solution)).sum()
        return self.energy - 2 * float((solution * self.cross).sum()) + float(quadratic)

    def solve(self, strength: float) -> Tensor:
        """Return (Σ w p pᵀ + λ I)⁻¹ Σ w p rᵀ, with λ = `strength` times the mean of the Gram's diagonal."""
        ridge = strength * float(self.gram.diagonal().mean())
        if ridge == 0.0:  # no feature was ever other than 0
            return torch.zeros_like(self.cross)
        system = self.whole
        system.diagonal().add_(ridge)
        lower, failed = torch.linalg.cholesky_ex(system)
        if int(failed):
            return torch.full_like(self.cross, torch.nan)
        return torch.cholesky_solve(self.cross, lower)


@dataclass(frozen=True)
class Fit:
    """A solution V (F, D), the strength that it was found with, and its held-out error relative to V = 0."""

    solution: Tensor
    strength: float
    error: float


def fit(train: Normal, held: Normal) -> Fit | None:
    """Choose the strength whose solution on `train` has the least error on `held`, and solve on both.

    Strengths are tried from the strongest on, until the error has grown twice. None where none of them betters the
    held-out error of V = 0; a system that is singular at a strength counts as no better.
    """
    best, least, worse = 0.0, held.energy, 0
    for strength in each(STRENGTHS, "solving", "strengths", share=0.5):
        error = held.error(train.solve(strength))
        if error < least:
            best, least, worse = strength, error, 0
        else:
            worse += 1
        if worse == 2 and best:
            break
    if not best:
        return None
    return Fit((train + held).solve(best), best, least / held.energy)
