"""Whitening: a factor of the covariance, bridged where rounding made it indefinite."""

from __future__ import annotations

import pytest
import torch
from compressing import silence_cholesky
from swiglu import seeded
from torch.testing import assert_close

from ditmoe_cli.compression.algebra.whitening import covariance_of, whitening
from ditmoe_cli.errors import BadInputError


def test_whitening_is_a_cholesky_factor() -> None:
    inputs = torch.randn(60, 7, generator=seeded(1)) * torch.logspace(-2, 1, 7)
    covariance = inputs.T @ inputs
    factor = whitening(covariance)
    assert torch.equal(factor, factor.tril())
    assert_close((factor @ factor.T).float(), covariance, rtol=1e-3, atol=1e-2)
    assert torch.equal(whitening(torch.zeros(7, 7)), torch.eye(7, dtype=torch.float64))


def test_rounding_below_zero_is_bridged_and_what_is_no_covariance_refused() -> None:
    bent = torch.diag(torch.tensor([1.0, 1.0, -1e-4]))
    assert bool(whitening(bent).isfinite().all())
    with pytest.raises(BadInputError, match="not positive semidefinite"):
        whitening(-torch.eye(3))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(BadInputError, match="NaN or infinite"):
            whitening(torch.full((3, 3), bad))


@pytest.mark.parametrize("tokens", [0, 1, 54])
def test_fewer_tokens_than_inputs_take_the_first_jitter(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    silence_cholesky(monkeypatch)
    inputs = 1e3 * torch.randn(tokens, 64, generator=seeded(1))
    covariance = covariance_of(inputs, torch.ones(tokens))
    factor, scale = whitening(covariance), covariance.diagonal().mean()
    expected = covariance + 1e-6 * scale * torch.eye(64) if tokens else torch.eye(64, dtype=torch.float64)
    assert_close(factor @ factor.T, expected, rtol=1e-9, atol=1e-9 * float(scale))


def test_a_factor_of_nan_is_not_taken_where_the_solver_reports_success(monkeypatch: pytest.MonkeyPatch) -> None:
    bent = torch.diag(torch.tensor([1.0, 1.0, -1e-4], dtype=torch.float64))
    expected = whitening(bent)
    silence_cholesky(monkeypatch)
    assert torch.equal(whitening(bent), expected)


@pytest.mark.parametrize("size", [1e-37, 1e-25, 1.0, 1e25, 1e37])
def test_covariances_neither_overflow_nor_vanish(size: float) -> None:
    inputs, weights = torch.tensor([[3.0, 0.0], [4.0, 1.0]]), torch.tensor([1.0, 0.25])
    found = covariance_of(size * inputs, weights)
    scale = torch.tensor(size, dtype=torch.float32).double() ** 2
    assert_close(found, scale * torch.tensor([[13.0, 1.0], [1.0, 0.25]], dtype=torch.float64), rtol=1e-6, atol=0)
    unit = torch.linalg.cholesky(found / scale)
    assert_close(whitening(found) / scale.sqrt(), unit, rtol=1e-4, atol=1e-4)
