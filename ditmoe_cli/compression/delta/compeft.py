"""ComPEFT: differences as sparse ternary codes and one scale (Yadav et al. 2023, https://arxiv.org/abs/2311.13171).

The paper keeps the largest of |Δ|, replaces them by ±α std(Δ) and searches a grid of k and α for the best accuracy.
Here α is what minimises the Frobenius error on the kept entries, which needs no grid: α = mean |Δ| over them / std(Δ),
so that the scale α std(Δ) is that mean itself. Codes are packed in base 3 instead of entropy-coded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.errors import UsageError


@dataclass(frozen=True)
class Ternary:
    """Δ ≈ scale · codes: codes in {-1, 0, 1}, int8 of Δ's shape."""

    codes: Tensor
    scale: float


def ternary(delta: Tensor, density: float) -> Ternary:
    """Return sign(Δ) on the ⌈density · size⌉ entries of largest |Δ|, 0 elsewhere, and the best scale for them.

    argmin_c ‖Δ - c · codes‖_F = Σ |Δ| / #codes over the kept entries. Ties fall to the entry that comes first; zeros
    are never kept. Raises `UsageError` for a density outside (0, 1].
    """
    if not 0.0 < density <= 1.0:
        raise UsageError(f"density of ternary codes {density}: give one above 0 and at most 1.0")
    flat = delta.reshape(-1).double()
    kept = flat.abs().argsort(descending=True, stable=True)[: math.ceil(density * flat.numel() - 1e-9)]
    codes = torch.zeros_like(flat, dtype=torch.int8)
    codes[kept] = flat[kept].sign().to(torch.int8)
    scale = float(flat[kept].abs().sum()) / max(int(codes.count_nonzero()), 1)
    return Ternary(codes.reshape(delta.shape), scale)
