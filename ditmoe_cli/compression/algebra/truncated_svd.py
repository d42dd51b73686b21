"""D²-MoE: differences as whitened truncated SVDs (Gu et al. 2025, https://arxiv.org/abs/2502.17298)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.errors import BadInputError

_JITTERS = tuple(10.0**power for power in range(-6, 1))


@dataclass(frozen=True)
class LowRank:
    """ΔW ≈ left right: left (m, r), right (r, n)."""

    left: Tensor
    right: Tensor

    def values(self) -> Tensor:
        """Return the product (m, n)."""
        return self.left @ self.right


def whitening(covariance: Tensor) -> Tensor:
    """Return S (n, n), lower triangular with S Sᵀ = C + jitter · I, in float64; the identity where C is 0.

    `covariance` C = Σ_t u uᵀ (n, n) is of the matrix's inputs; its scale does not matter. The jitter starts at
    a millionth of the mean diagonal and grows until a Cholesky factor exists, as C may miss directions and carry
    rounding. Raises `BadInputError` where no jitter up to the mean diagonal helps.
    """
    covariance = covariance.double()
    scale = covariance.diagonal().mean()
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    if not bool(covariance.any()):
        return identity
    for jitter in _JITTERS:
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(covariance + jitter * scale * identity)
        if not int(failed):
            return factor
    raise BadInputError("input covariance is not positive semidefinite; collect it again in fp32 or wider")


def truncated(delta: Tensor, rank: int, covariance: Tensor | None = None) -> LowRank:
    """Return the factors of rank r nearest to ΔW (m, n) on its inputs: minimal ‖(ΔW - left right) S‖_F, in fp32.

    S whitens the inputs' covariance (n, n), the identity if None. With ΔW S = U Σ Vᵀ the optimum is
    U_r Σ_r V_rᵀ S⁻¹ = U_r U_rᵀ ΔW, so left = U_r, right = U_rᵀ ΔW and S is never inverted. `rank` is at most
    min(m, n), at which the factors are exact; `sizes.rank_of_ratio` gives it for a ratio of weights. Raises
    `BadInputError` for a covariance that is none.
    """
    wide = delta.double()
    whitened = wide if covariance is None else wide @ whitening(covariance)
    left = torch.linalg.svd(whitened, full_matrices=False).U[:, :rank]
    return LowRank(left.float(), (left.T @ wide).float())
