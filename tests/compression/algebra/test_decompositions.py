"""Decompositions give their matrix again, also where it is 0 or of low rank."""

from __future__ import annotations

import pytest
import torch

from ditmoe_cli.compression.algebra.decompositions import svd

MATRICES = {
    "tall": torch.randn(9, 4, dtype=torch.float64),
    "wide": torch.randn(4, 9, dtype=torch.float64),
    "zero": torch.zeros(6, 8, dtype=torch.float64),
    "identity": torch.eye(5, dtype=torch.float64),
    "rank 1": torch.ones(6, 7, dtype=torch.float64),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name", MATRICES)
def test_factors_give_the_matrix_again(name: str, device: str) -> None:
    matrix = MATRICES[name].to(device)
    u, s, vh = svd(matrix)
    assert u.device == matrix.device
    torch.testing.assert_close(u @ torch.diag(s) @ vh, matrix)
    torch.testing.assert_close(u.T @ u, torch.eye(len(s), dtype=u.dtype, device=device))
