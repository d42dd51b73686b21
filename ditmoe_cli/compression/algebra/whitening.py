"""Whitening: a factor of the covariance of a matrix's inputs, so that errors count as the inputs meet them."""

from __future__ import annotations

import torch
from torch import Tensor

from ditmoe_cli.compression.algebra.decompositions import cholesky
from ditmoe_cli.errors import BadInputError

_JITTERS = tuple(10.0**power for power in range(-6, 1))


def covariance_of(inputs: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_t w_t u_t u_tᵀ (n, n) of inputs u (T, n) and weights w (T,) of at least 0, in float64.

    0 without tokens. Squares of any fp32 value neither overflow nor vanish there.
    """
    scaled = inputs.double() * weights.double().sqrt().unsqueeze(1)
    return scaled.T @ scaled


def whitening(covariance: Tensor) -> Tensor:
    """Return S (n, n), lower triangular with S Sᵀ = C + jitter · I, in float64; the identity where C is 0.

    C = Σ_t u uᵀ (n, n) is the covariance of a matrix's inputs, of any scale. The jitter starts at a millionth of the
    mean diagonal and grows until a Cholesky factor exists, as C may miss directions and carry rounding: summed in fp32
    over fewer tokens than n, rounding alone takes it further below 0 than the first jitter. `covariance_of` sums in
    fp64.

    Raises `BadInputError` for values that are not finite, and where no jitter up to the mean diagonal helps.
    """
    covariance = covariance.double()
    if not bool(covariance.isfinite().all()):
        raise BadInputError("the covariance of inputs holds NaN or infinite values")
    scale = covariance.diagonal().mean()
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    if not bool(covariance.any()):
        return identity
    for jitter in _JITTERS:
        factor = cholesky(covariance + jitter * scale * identity)
        if factor is not None:
            return factor
    raise BadInputError("input covariance is not positive semidefinite; collect it again in fp32 or wider")
