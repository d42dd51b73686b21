"""Decompositions give their matrix again, also where it is 0 or of low rank; those that fail say so."""

from __future__ import annotations

import math

import pytest
import torch
from compressing import silence_cholesky

from ditmoe_cli.compression.algebra.decompositions import cholesky, svd

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
MATRICES = {
    "tall": torch.randn(9, 4, dtype=torch.float64),
    "wide": torch.randn(4, 9, dtype=torch.float64),
    "zero": torch.zeros(6, 8, dtype=torch.float64),
    "identity": torch.eye(5, dtype=torch.float64),
    "rank 1": torch.ones(6, 7, dtype=torch.float64),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MATRICES)
def test_factors_give_the_matrix_again(name: str, device: str) -> None:
    matrix = MATRICES[name].to(device)
    u, s, vh = svd(matrix)
    assert u.device == matrix.device
    torch.testing.assert_close(u @ torch.diag(s) @ vh, matrix)
    torch.testing.assert_close(u.T @ u, torch.eye(len(s), dtype=u.dtype, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_a_cholesky_factor_gives_the_matrix_again(scale: float, device: str) -> None:
    matrix = scale * torch.tensor([[4.0, 12.0, -16.0], [12.0, 37.0, -43.0], [-16.0, -43.0, 98.0]], dtype=torch.float64)
    expected = scale**0.5 * torch.tensor([[2.0, 0.0, 0.0], [6.0, 1.0, 0.0], [-8.0, 5.0, 3.0]], dtype=torch.float64)
    found = cholesky(matrix.to(device))
    assert found is not None
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reported", [True, False])
@pytest.mark.parametrize("size", [1, 3, 64, 130])
@pytest.mark.parametrize("last", [-1.0, -1e-9, 0.0, math.nan, math.inf])
def test_what_has_no_cholesky_factor_is_told_also_where_the_solver_reports_success(
    last: float, size: int, reported: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.eye(size, dtype=torch.float64, device=device)
    matrix[-1, -1] = last  # the pivot that a rounded covariance of few tokens fails at
    if not reported:
        silence_cholesky(monkeypatch)
    assert cholesky(matrix) is None
