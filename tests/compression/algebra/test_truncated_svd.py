"""Whitened truncated SVD: optimal in the inputs' norm, exact at full rank, and its size."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swiglu import seeded
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.compression.algebra.truncated_svd import LowRank, truncated, whitening
from ditmoe_cli.compression.delta.delta_sizes import rank_of_ratio
from ditmoe_cli.errors import BadInputError, UsageError

SHAPES = ((12, 7), (7, 12), (9, 9))


def case(shape: tuple[int, int], tokens: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """A difference, inputs of unequal scale, and their covariance."""
    delta = torch.randn(shape, generator=seeded(0))
    scale = torch.logspace(-2, 1, shape[1])
    inputs = (torch.randn(tokens, shape[1], generator=seeded(1)) * scale) @ torch.linalg.qr(
        torch.randn(shape[1], shape[1], generator=seeded(2))
    ).Q
    return delta, inputs, inputs.T @ inputs


def error(delta: Tensor, found: LowRank, inputs: Tensor) -> float:
    return float((inputs.double() @ (delta - found.values()).double().T).norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_no_factors_of_the_rank_are_nearer_on_the_inputs(shape: tuple[int, int], rank: int) -> None:
    delta, inputs, covariance = case(shape)
    found = truncated(delta, rank, covariance)
    assert (found.left.shape, found.right.shape) == ((shape[0], rank), (rank, shape[1]))
    # Eckart and Young: what is lost on the inputs are the last singular values of their outputs
    lost = torch.linalg.svdvals(inputs.double() @ delta.double().T)[rank:].norm()
    assert error(delta, found, inputs) == pytest.approx(float(lost), rel=1e-3)
    assert error(delta, found, inputs) < error(delta, truncated(delta, rank), inputs)


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_without_a_covariance_it_is_the_truncated_svd(rank: int) -> None:
    delta = case(SHAPES[0])[0]
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    assert_close(truncated(delta, rank).values(), (left[:, :rank] * values[:rank]) @ right[:rank], rtol=1e-4, atol=1e-4)
    identity = truncated(delta, rank, torch.eye(delta.shape[1]))
    assert_close(identity.values(), truncated(delta, rank).values(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [60, 3, 0])
def test_full_rank_is_exact_however_few_the_tokens(shape: tuple[int, int], tokens: int) -> None:
    delta, _, covariance = case(shape, tokens)
    assert_close(truncated(delta, min(shape), covariance).values(), delta, rtol=1e-4, atol=1e-4)


def test_the_scale_of_the_covariance_does_not_matter() -> None:
    delta, _, covariance = case(SHAPES[0])
    small, large = (truncated(delta, 3, factor * covariance).values() for factor in (1e-6, 1e6))
    assert_close(small, large, rtol=1e-3, atol=1e-4)


def test_whitening_is_a_cholesky_factor() -> None:
    covariance = case((7, 7))[2]
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


@given(st.integers(1, 6000), st.integers(1, 6000), st.integers(1, 1000))
def test_a_rank_holds_at_most_the_ratio_of_weights(rows: int, columns: int, thousandths: int) -> None:
    rank = rank_of_ratio(rows, columns, thousandths / 1000)
    allowed = Fraction(thousandths, 1000) * rows * columns
    assert rank * (rows + columns) <= allowed < (rank + 1) * (rows + columns)


@pytest.mark.parametrize("ratio", [0.0, 1.5, float("nan")])
def test_what_is_no_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(UsageError, match="ratio of a difference's weights"):
        rank_of_ratio(8, 8, ratio)
