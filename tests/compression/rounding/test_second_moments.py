"""Second moments: sums over tokens however they are batched, shrinking by weights, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swiglu import seeded
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.compression.rounding import second_moments
from ditmoe_cli.compression.rounding.second_moments import (
    effective_tokens,
    rooted,
    second_moment,
    shrunk_weights,
)
from ditmoe_cli.errors import BadInputError

seeds = st.integers(0, 9999)
CPU = torch.device("cpu")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def moment(inputs: Tensor, weights: Tensor, *batches: int) -> Tensor:
    sizes = list(batches) or [len(inputs)]
    parts = zip(torch.split(inputs, sizes), torch.split(weights, sizes), strict=True)
    return second_moment(parts, inputs.shape[1], CPU)


@given(seeds, st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 20), st.integers(1, 30))
def test_moments_are_sums_over_tokens_however_they_are_batched(
    seed: int, batches: list[int], width: int, strip: int
) -> None:
    tokens = sum(batches)
    inputs, weights = normal(seed, tokens, width).float(), normal(seed + 1, tokens).square()
    wanted = torch.einsum("t,ti,tj->ij", weights, inputs.double(), inputs.double()).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(second_moments, "_STRIP", strip)
        found = moment(inputs, weights, *batches)
    assert_close(found, wanted)
    off_diagonal = ~torch.eye(width, dtype=torch.bool)
    assert_close(found[off_diagonal], found.T[off_diagonal])
    root = rooted(inputs, weights)
    assert_close(root.T @ root, wanted)


@given(st.integers(1, 50), st.floats(0.01, 100), st.integers(0, 50))
def test_tokens_of_one_weight_count_each_and_those_of_none_not(tokens: int, weight: float, idle: int) -> None:
    weights = torch.cat([torch.full((tokens,), weight), torch.zeros(idle)])
    assert effective_tokens(weights) == pytest.approx(tokens)
    assert effective_tokens(torch.zeros(idle)) == 0


@given(seeds, st.integers(1, 30))
def test_unequal_weights_count_for_fewer_tokens(seed: int, tokens: int) -> None:
    assert 1 - 1e-9 <= effective_tokens(normal(seed, tokens).square()) <= tokens + 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inputs_of_any_dtype_are_summed_in_fp32(dtype: torch.dtype) -> None:
    inputs = normal(0, 5000, 3).to(dtype)
    found = moment(inputs, torch.ones(5000), 2000, 2000, 1000)
    assert found.dtype == torch.float32
    wanted = (inputs.double().T @ inputs.double()).float()
    assert_close(found, wanted, rtol=1e-5, atol=1e-2)  # one token more or less would shift it by about 1


@given(seeds, st.integers(0, 40), st.integers(1, 30))
def test_shrinking_weighs_an_expert_by_its_tokens(seed: int, tokens: int, width: int) -> None:
    """λ = n / (n + K) of its own mean moment, and the rest of the pooled one, some tokens being of both."""
    inputs = normal(seed, 100, 4).float()
    own, pooled = torch.zeros(100), torch.ones(100)
    own[:tokens], pooled[:10] = 3.0, 0.0
    share = tokens / (tokens + width)
    wanted = share * moment(inputs, own) / max(float(own.sum()), 1) + (1 - share) * moment(inputs, pooled) / 90
    assert_close(moment(inputs, shrunk_weights(own, pooled, width)), wanted)
    assert float(shrunk_weights(own, pooled, width).sum()) == pytest.approx(1 if tokens else width / width)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_where_they_stand(bad: float) -> None:
    inputs, weights = torch.ones(15, 2), torch.ones(15)
    inputs[12, 1] = bad
    with pytest.raises(BadInputError, match="input of token 12 "):
        moment(inputs, weights, 10, 5)
    weights[7] = bad
    with pytest.raises(BadInputError, match="weight of token 7 "):
        moment(torch.ones(15, 2), weights, 5, 10)


def test_sums_that_overflow_negative_weights_and_other_shapes_are_refused() -> None:
    with pytest.raises(BadInputError, match="exceeds fp32 in row 1"):
        moment(torch.tensor([[1.0, 1e30]]), torch.ones(1))
    with pytest.raises(BadInputError, match="weight of token 1 "):
        moment(torch.ones(3, 2), torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(BadInputError, match=r"\(3, 2\) and weights \(1,\)"):
        rooted(torch.ones(3, 2), torch.ones(1))


def test_batches_are_taken_one_after_the_other() -> None:
    """So that the inputs of all tokens are never in memory together."""
    alive: list[int] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(3):
            alive.append(i)
            yield torch.ones(2, 4), torch.ones(2)
            alive.remove(i)
            assert not alive

    assert_close(second_moment(batches(), 4, CPU), torch.full((4, 4), 6.0))
