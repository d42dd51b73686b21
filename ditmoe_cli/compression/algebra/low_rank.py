"""Linear stand-ins of low rank: reduced-rank ridge regression (Mukherjee and Zhu 2011, doi:10.1002/sam.10138).

https://pmc.ncbi.nlm.nih.gov/articles/PMC3444519. One step up from a constant in place of a dropped expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.algebra.decompositions import cholesky, svd
from ditmoe_cli.errors import BadInputError

DEFAULT_RIDGE = 1e-3


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_t w_t v_t / Σ_t w_t (D,) of values (T, D) and weights (T,); 0 where all weights are."""
    weights = weights.to(values)
    total = weights.sum()
    return weights @ values / torch.where(total > 0, total, 1.0)


@dataclass(frozen=True)
class LinearMap:
    """f(u) ≈ v + A B u: up A (D, r), down B (r, D), constant v (D,)."""

    up: Tensor
    down: Tensor
    constant: Tensor


def low_rank_map(
    inputs: Tensor, outputs: Tensor, weights: Tensor, rank: int, ridge: float = DEFAULT_RIDGE
) -> LinearMap:
    """Return the map of rank r that minimises Σ_t ω_t ‖f_t - v - A B u_t‖² + λ ‖A B‖², in fp32.

    With centred U, F scaled by √ω, C = UᵀU + λI = L Lᵀ and the ridge solution W = C⁻¹UᵀF, the predictions (with the
    penalty's rows) have the singular vectors of LᵀW = L⁻¹UᵀF = P Σ Vᵀ: A = V_r, B = (L⁻ᵀ P_r Σ_r)ᵀ, and
    v = mean f - A B mean u. Rank D is ridge regression, rank 0 the constant v = mean f.

    Args:
        inputs: u (T, D) of the tokens that were routed to the expert; T may be 0, and then all is 0.
        outputs: f (T, D).
        weights: ω = w g² (T,), with the routing weight g and any weight w of the token.
        rank: r, at most D.
        ridge: λ in units of the mean of Σ_t ω u² over the D inputs, above 0; it also bounds inputs that hardly vary.

    Raises:
        BadInputError: inputs or weights are not finite.
    """
    u, f, weights = inputs.double(), outputs.double(), weights.double()
    u_mean, f_mean = weighted_mean(u, weights), weighted_mean(f, weights)
    penalty = (ridge * (weights @ u.square()).mean()).clamp_min(torch.finfo(u.dtype).tiny)
    centred = u - u_mean
    weighted = centred * weights.unsqueeze(-1)
    identity = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    factor = cholesky(weighted.T @ centred + penalty * identity)
    if factor is None:  # λ is far above rounding in fp64
        raise BadInputError("inputs or routing weights of an expert hold NaN or infinite values")
    whitened = torch.linalg.solve_triangular(factor, weighted.T @ (f - f_mean), upper=False)
    left, values, right = svd(whitened)
    up = right[:rank].T
    down = torch.linalg.solve_triangular(factor.T, left[:, :rank] * values[:rank], upper=True).T
    return LinearMap(up.float(), down.float(), (f_mean - up @ (down @ u_mean)).float())
