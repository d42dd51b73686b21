"""D²-MoE: differences as whitened truncated SVDs (Gu et al. 2025, https://arxiv.org/abs/2502.17298)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditmoe_cli.compression.algebra.decompositions import svd
from ditmoe_cli.compression.algebra.whitening import whitening
from ditmoe_cli.errors import BadInputError


@dataclass(frozen=True)
class LowRank:
    """ΔW ≈ left right: left (m, r), right (r, n)."""

    left: Tensor
    right: Tensor


def truncated(delta: Tensor, rank: int, covariance: Tensor | None = None) -> LowRank:
    """Return the factors of rank r nearest to ΔW (m, n) on its inputs: minimal ‖(ΔW - left right) S‖_F, in fp32.

    S whitens the inputs' covariance (n, n), the identity if None. With ΔW S = U Σ Vᵀ the optimum is
    U_r Σ_r V_rᵀ S⁻¹ = U_r U_rᵀ ΔW, so left = U_r, right = U_rᵀ ΔW and S is never inverted. `rank` is at most
    min(m, n), at which the factors are exact; `rank_of_ratio` gives it for a ratio of weights. Raises `BadInputError`
    for a covariance that is not positive semidefinite, and for values that are not finite.
    """
    wide = delta.double()
    whitened = wide if covariance is None else wide @ whitening(covariance)
    if not bool(whitened.isfinite().all()):
        raise BadInputError("a difference of experts holds NaN or infinite values")
    left = svd(whitened).U[:, :rank]
    return LowRank(left.float(), (left.T @ wide).float())
