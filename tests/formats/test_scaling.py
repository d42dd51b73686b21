"""Whether scales hold a weight is decided by the largest values of groups as by all values."""

from __future__ import annotations

import plain_formats
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import odd, random
from torch import Tensor

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats.scaling import (
    SCALE_ERROR,
    Rescaled,
    group_extents,
    largest_of_rows,
    require_group_scales,
)


def refused(weight: Tensor, group: int, steps: float) -> bool:
    try:
        require_group_scales(weight, group_extents(weight, group), group, steps, "x", "some")
    except BadInputError:
        return True
    return False


@given(
    exponent=st.floats(-9, 0),
    group=st.sampled_from([32, 64, 128]),
    steps=st.sampled_from([2.0, 3.0, 15.0, 255.0]),
    seed=st.integers(0, 999),
    shape=st.tuples(st.integers(1, 10), st.integers(8, 200)),
)
def test_what_scales_lose_is_refused_as_sums_over_all_values_say(
    exponent: float, group: int, steps: float, seed: int, shape: tuple[int, int]
) -> None:
    weight = random(shape, seed).clamp(-100, 100) * 10.0**exponent
    assert refused(weight, group, steps) == (plain_formats.rescaling_loss(weight, group, steps) > SCALE_ERROR)


@given(seed=st.integers(0, 999), steps=st.sampled_from([2.0, 15.0, 255.0]))
def test_rows_of_every_kind_are_decided_as_sums_over_all_values_say(seed: int, steps: float) -> None:
    weight = odd((14, 100), seed)
    assert refused(weight, 32, steps) == (plain_formats.rescaling_loss(weight, 32, steps) > SCALE_ERROR)


def test_usual_weights_are_decided_without_sums() -> None:
    def energies() -> Tensor:
        raise AssertionError("sums were not needed")

    weight = 0.02 * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[5] *= 1e-7  # a dead neuron, whose scales are lost
    extents = group_extents(weight, 64)
    scale = ((extents.high - extents.low) / 15).double()
    lost = torch.where(scale > 0, scale.half().double() / scale - 1, 0.0)
    assert lost.abs().max() == 1
    Rescaled("x", "some", lost, extents.largest, 64).require_small(energies)


@given(
    lost=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    largest=st.lists(st.floats(0, 10), min_size=6, max_size=6),
    share=st.lists(st.floats(0, 1), min_size=6, max_size=6),
)
def test_maxima_decide_only_what_sums_decide_alike(lost: list[float], largest: list[float], share: list[float]) -> None:
    n, size = len(lost), 64
    most = torch.tensor(largest[:n], dtype=torch.float64)
    energy = most.square() * (1 + (size - 1) * torch.tensor(share[:n], dtype=torch.float64))
    change = torch.tensor(lost, dtype=torch.float64) * 0.02
    exact = bool((energy * change.square()).sum() > SCALE_ERROR**2 * energy.sum())
    rescaled = Rescaled("x", "some", change, most, size)
    if exact:
        with pytest.raises(BadInputError, match="'x' holds values so small that some"):
            rescaled.require_small(lambda: energy)
    else:
        rescaled.require_small(lambda: energy)


@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    seed=st.integers(0, 99),
)
def test_the_largest_of_rows_are_exact_in_every_dtype(dtype: torch.dtype, shape: tuple[int, int], seed: int) -> None:
    weight = odd(shape, seed).to(dtype)
    assert torch.equal(largest_of_rows(weight), weight.float().abs().amax(dim=1))
    weight[0, -1] = -torch.inf
    assert largest_of_rows(weight)[0] == torch.inf
    weight[0, 0] = torch.nan
    assert largest_of_rows(weight)[0].isnan()
    assert torch.equal(largest_of_rows(weight.t())[1:], weight.t().float().abs().amax(dim=1)[1:])
