"""Products are those of torch, whichever library computes them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ditmoe_cli.formats import products
from ditmoe_cli.formats.products import ROW_STEP, linear, padded_rows


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 16), (600, 160)])
def test_a_product_is_torchs(shape: tuple[int, ...], dtype: torch.dtype, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weight, bias = torch.randn(240, shape[-1], generator=generator), torch.randn(240, generator=generator)
    exact = F.linear(x.to(dtype).double(), weight.to(dtype).double(), bias.to(dtype).double() if biased else None)
    found = linear(x.to(dtype), weight.to(dtype), bias.to(dtype) if biased else None)
    assert found.dtype == dtype and found.shape == exact.shape
    assert float((found.double() - exact).norm() / exact.norm()) < 4 * torch.finfo(dtype).eps


def test_gradients_are_recorded_as_in_torch() -> None:
    x, weight = torch.randn(600, 160), torch.randn(240, 160, requires_grad=True)
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, x.sum(dim=0).expand(240, -1), rtol=1e-4, atol=1e-3)


def test_products_without_onednns_layer_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn", lambda _: False)
    x, weight = torch.randn(600, 160), torch.randn(240, 160)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert padded_rows(600, x) == 600


def test_rows_are_rounded_up_where_products_are_large() -> None:
    wide = torch.empty(1, 384)
    for rows in (100, 112, 113):
        padded = padded_rows(rows, wide)
        assert padded == rows or (padded % ROW_STEP == 0 and rows < padded < rows + ROW_STEP)
    assert padded_rows(5, torch.empty(1, 32)) == 5
    assert padded_rows(100, wide.double()) == 100


def test_a_bias_alone_has_gradients_too() -> None:
    bias = torch.zeros(240, requires_grad=True)
    linear(torch.randn(600, 160), torch.randn(240, 160), bias).sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((240,), 600.0))
