"""Whitening: a factor of the covariance, bridged where rounding made it indefinite."""

from __future__ import annotations

import pytest
import torch
from swiglu import seeded
from torch.testing import assert_close

from ditmoe_cli.compression.algebra.whitening import whitening
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
    for none in (-torch.eye(3), torch.full((3, 3), torch.nan)):
        with pytest.raises(BadInputError, match="not positive semidefinite"):
            whitening(none)
