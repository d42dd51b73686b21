"""Singular value decompositions that also end where a GPU's solver does not converge."""

from __future__ import annotations

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
        try:
            return Svd(*torch.linalg.svd(matrix, full_matrices=False, driver="gesvd"))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return Svd(*(part.to(matrix.device) for part in svd(matrix.cpu())))
    return Svd(*torch.linalg.svd(matrix, full_matrices=False))
