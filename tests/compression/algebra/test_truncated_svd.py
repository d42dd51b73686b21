"""Whitened truncated SVD: optimal in the inputs' norm and exact at full rank."""

from __future__ import annotations

import pytest
import torch
from swiglu import seeded
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.compression.algebra.truncated_svd import LowRank, truncated
from ditmoe_cli.compression.algebra.whitening import covariance_of
from ditmoe_cli.errors import BadInputError

SHAPES = ((12, 7), (7, 12), (9, 9))


def case(shape: tuple[int, int], tokens: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """A difference, inputs of unequal scale, and their covariance."""
    delta = torch.randn(shape, generator=seeded(0))
    scale = torch.logspace(-2, 1, shape[1])
    inputs = (torch.randn(tokens, shape[1], generator=seeded(1)) * scale) @ torch.linalg.qr(
        torch.randn(shape[1], shape[1], generator=seeded(2))
    ).Q
    return delta, inputs, inputs.T @ inputs


def product(factors: LowRank) -> Tensor:
    return factors.left @ factors.right


def error(delta: Tensor, found: LowRank, inputs: Tensor) -> float:
    return float((inputs.double() @ (delta - product(found)).double().T).norm())


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
    assert_close(product(truncated(delta, rank)), (left[:, :rank] * values[:rank]) @ right[:rank], rtol=1e-4, atol=1e-4)
    identity = truncated(delta, rank, torch.eye(delta.shape[1]))
    assert_close(product(identity), product(truncated(delta, rank)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [60, 3, 0])
def test_full_rank_is_exact_however_few_the_tokens(shape: tuple[int, int], tokens: int) -> None:
    delta, _, covariance = case(shape, tokens)
    assert_close(product(truncated(delta, min(shape), covariance)), delta, rtol=1e-4, atol=1e-4)


def test_the_scale_of_the_covariance_does_not_matter() -> None:
    delta, _, covariance = case(SHAPES[0])
    small, large = (product(truncated(delta, 3, factor * covariance)) for factor in (1e-6, 1e6))
    assert_close(small, large, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e20, 1e36])
def test_neither_does_that_of_the_difference(size: float) -> None:
    delta, inputs, _ = case(SHAPES[0])
    covariance = covariance_of(inputs, torch.ones(len(inputs)))
    found = truncated(size * delta, 3, covariance)
    assert bool(found.left.isfinite().all() & found.right.isfinite().all())
    assert_close(found.left @ (found.right.double() / size).float(), product(truncated(delta, 3, covariance)))


def test_values_that_are_no_numbers_are_refused_in_one_line() -> None:
    delta, _, covariance = case(SHAPES[0])
    for broken in ((delta.clone().index_fill_(0, torch.tensor([1]), torch.nan), covariance), (delta, covariance / 0)):
        with pytest.raises(BadInputError, match="NaN or infinite"):
            truncated(broken[0], 3, broken[1])
