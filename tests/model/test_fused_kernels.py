"""Kernels of a GPU compute what their plain twins do; `usable` leaves all else to these."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.model import fused_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


def near(found: Tensor, expected: Tensor) -> None:
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.float(), expected.float(), rtol=8 * eps, atol=8 * eps)


def test_the_cpu_takes_the_plain_twins() -> None:
    assert not fused_kernels.usable(torch.zeros(2))


@pytest.mark.cuda
def test_training_takes_the_plain_twins() -> None:
    x = torch.zeros(2, device="cuda", requires_grad=True)
    assert not fused_kernels.usable(x)
    with torch.no_grad():
        assert fused_kernels.usable(x)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 200), (5, 4, 4608), (0, 64)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    both = torch.randn(*shape, device="cuda").to(dtype)
    gate, up = both.float().chunk(2, dim=-1)
    near(fused_kernels.swiglu(both), F.silu(gate) * up)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 384, 1152])
def test_modulated_norm(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(3, 5, width, device="cuda") + 2
    modulation = torch.randn(3, 6 * width, device="cuda")
    shift, scale = modulation.chunk(6, dim=1)[1:3]
    found = fused_kernels.modulated_norm(x, shift, scale, EPS, dtype)
    expected = F.layer_norm(x, (width,), eps=EPS) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_sum(dtype: torch.dtype) -> None:
    residual, added = torch.randn(2, 7, 48, device="cuda"), torch.randn(2, 7, 48, device="cuda").to(dtype)
    gate = torch.randn(2, 96, device="cuda")[:, 48:]
    near(fused_kernels.gated_sum(residual, gate, added), residual + gate.unsqueeze(1) * added.float())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_weighted_sum(dtype: torch.dtype, top_k: int) -> None:
    ordered = torch.randn(9 * top_k, 48, device="cuda").to(dtype)
    inverse = torch.randperm(9 * top_k, device="cuda")
    weights = torch.rand(9, top_k, device="cuda")
    expected = (ordered.float()[inverse].reshape(9, top_k, 48) * weights.unsqueeze(-1)).sum(dim=1)
    near(fused_kernels.weighted_sum(ordered, inverse, weights), expected)
