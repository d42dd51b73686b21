"""Whitening: a factor of the covariance of a matrix's inputs, so that errors count as the inputs meet them."""

from __future__ import annotations

import torch
from torch import Tensor

from ditmoe_cli.errors import BadInputError

_JITTERS = tuple(10.0**power for power in range(-6, 1))


def whitening(covariance: Tensor) -> Tensor:
    """Return S (n, n), lower triangular with S Sᵀ = C + jitter · I, in float64; the identity where C is 0.

    C = Σ_t u uᵀ (n, n) is the covariance of a matrix's inputs, of any scale. The jitter starts at a millionth of the
    mean diagonal and grows until a Cholesky factor exists, as C may miss directions and carry rounding.

    Raises `BadInputError` where no jitter up to the mean diagonal helps.
    """
    covariance = covariance.double()
    scale = covariance.diagonal().mean()
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    if not bool(covariance.any()):
        return identity
    for jitter in _JITTERS:
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(covariance + jitter * scale * identity)
        if not int(failed) and bool(factor.isfinite().all()):  # a GPU's solver may report success all the same
            return factor
    raise BadInputError("input covariance is not positive semidefinite; collect it again in fp32 or wider")
