"""Embedders of patches, times and positions by their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.model.embedders import TimestepEmbedder, sincos_position_embedding


@given(quarter=st.integers(1, 24), side=st.integers(1, 12))
def test_position_embedding_by_its_formula(quarter: int, side: int) -> None:
    width = 4 * quarter
    found = sincos_position_embedding(width, side)
    assert found.shape == (1, side * side, width)
    row, column = side - 1, side // 2
    for offset, position in ((0, column), (width // 2, row)):
        for i in range(quarter):
            angle = position / 10_000 ** (i / quarter)
            assert math.isclose(found[0, row * side + column, offset + i], math.sin(angle), abs_tol=1e-6)
            assert math.isclose(found[0, row * side + column, offset + quarter + i], math.cos(angle), abs_tol=1e-6)
    torch.testing.assert_close(found.square().sum(-1), torch.full((1, side * side), width / 2))


@pytest.mark.parametrize("time", [0.0, 0.02, 1.0, 37.0, 999.0])
def test_time_embedding_by_its_formula(time: float) -> None:
    embedder = TimestepEmbedder(8).requires_grad_(False)
    angles = [time * math.exp(-math.log(10_000) * i / 128) for i in range(128)]
    features = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    found = embedder(torch.tensor([time]), torch.float32)[0]
    torch.testing.assert_close(found, embedder.mlp(features), rtol=1e-4, atol=1e-4)


def test_times_keep_their_precision_in_half_models() -> None:
    """999 and 998.9 are one number in bfloat16; the angles must not see that."""
    embedder = TimestepEmbedder(8).requires_grad_(False).bfloat16()
    near = embedder(torch.tensor([999.0, 998.9]), torch.bfloat16)
    assert near.dtype == torch.bfloat16
    assert not torch.equal(near[0], near[1])


def test_patches_are_embedded_row_by_row(pico: Callable[..., Pico]) -> None:
    model = pico().model()
    x = torch.randn(1, 4, 8, 8)
    tokens = model.x_embedder(x)
    kernel, bias = model.x_embedder.proj.weight, model.x_embedder.proj.bias
    for i, j in ((0, 0), (0, 3), (2, 1)):
        patch = x[0, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        expected = (kernel * patch).sum(dim=(1, 2, 3)) + bias
        torch.testing.assert_close(tokens[0, 4 * i + j], expected, rtol=1e-4, atol=1e-5)
