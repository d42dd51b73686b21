"""Least-squares output scales: the factors that bring compressed outputs closest to the original ones.

Dropping experts changes the routed sum's size: the router's softmax loses rows, and tokens go elsewhere. A factor on
outputs costs nothing, as it folds into W_down. Outputs are best multiplied by the block's residual gate γ first, so
that errors count as they reach the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_RIDGE = 1e-6


@dataclass(frozen=True)
class NormalEquations:
    """The sums that survivors' scales need: A_kl = Σ_t w ⟨r_k, r_l⟩ (K, K) and b_k = Σ_t w ⟨r_k, y⟩ (K,).

    Those of several batches of tokens add up.
    """

    gram: Tensor
    moments: Tensor

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(self.gram + other.gram, self.moments + other.moments)


def normal_equations(wanted: Tensor, parts: Tensor, weights: Tensor) -> NormalEquations:
    """Return the sums in float64 over tokens of wanted outputs y (T, D), weighing w (T,).

    `parts` (K, T, D) holds what each survivor adds, r_k = g_k f_k, 0 for tokens that did not select it.
    """
    flat = parts.double().flatten(1)  # (K, T D)
    weighted = (parts.double() * weights.double().unsqueeze(-1)).flatten(1)
    return NormalEquations(weighted @ flat.T, weighted @ wanted.double().flatten())


def survivor_scales(equations: NormalEquations, ridge: float = DEFAULT_RIDGE) -> Tensor:
    """Return c (K,) that minimises Σ_t w ‖y - Σ_k c_k r_k‖² + λ ‖c - 1‖², λ = ridge · mean diagonal of A.

    c - 1 is the least-norm solution of (A + λI)(c - 1) = b - A1, so that scales which the tokens do not determine,
    such as an unused survivor's, stay at 1 and a singular matrix is no harm. In float64.
    """
    gram = equations.gram.double()
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    residual = equations.moments.double() - gram.sum(dim=1)
    change: Tensor = torch.linalg.pinv(damped, hermitian=True) @ residual
    return 1.0 + change
