"""Decompositions that are whole on a GPU as on the CPU.

A GPU's solvers may not converge where the CPU's do, and may report success for what holds NaN: so the result itself is
looked at, at the price of one wait for the device.
"""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor


class Svd(NamedTuple):
    """A = U diag(S) Vh."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def svd(matrix: Tensor) -> Svd:
    """Return the thin decomposition of a matrix (m, n), on its device.

    A GPU's solvers give up on matrices of many equal singular values, as of 0; the CPU's does not, and takes over.
    """
    if matrix.is_cuda:
        with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            found = Svd(*torch.linalg.svd(matrix, full_matrices=False, driver="gesvd"))
            if bool(found.U.isfinite().all() & found.S.isfinite().all() & found.Vh.isfinite().all()):
                return found
        return Svd(*(part.to(matrix.device) for part in svd(matrix.cpu())))
    return Svd(*torch.linalg.svd(matrix, full_matrices=False))


def cholesky(matrix: Tensor) -> Tensor | None:
    """Return L, lower triangular with L Lᵀ = A (n, n); None where A is not positive definite, or not finite.

    All entries of a row of L enter its diagonal one, which so tells whether the row is sound: cuSOLVER may report
    success for a factor of NaN (https://github.com/pytorch/pytorch/issues/64818).
    """
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(matrix)
    pivots = lower.diagonal()
    return lower if bool((failed == 0) & ((pivots > 0) & pivots.isfinite()).all()) else None
