"""Products are those of torch, whichever library computes them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ditmoe_cli.formats import products
from ditmoe_cli.formats.products import ROW_STEP, fuses, linear, linear_times, padded_rows, prepacked, silu_linear


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
    assert padded_rows(1, wide) in (1, ROW_STEP), "a matrix that may be prepacked is multiplied otherwise by one row"
    assert padded_rows(100, wide.double()) == 100


def test_a_bias_alone_has_gradients_too() -> None:
    bias = torch.zeros(240, requires_grad=True)
    linear(torch.randn(600, 160), torch.randn(240, 160), bias).sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((240,), 600.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 16), (600, 160), (2, 300, 160)])
def test_activated_and_multiplied_products_are_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator).to(dtype), torch.randn(240, shape[-1], generator=generator)
    weight, factor = weight.to(dtype), torch.randn(*shape[:-1], 240, generator=generator).to(dtype)
    exact = F.linear(x.double(), weight.double())
    wanted = {silu_linear(x, weight): F.silu(exact), linear_times(x, weight, factor): exact * factor.double()}
    for found, right in wanted.items():
        assert found.dtype == dtype and found.shape == right.shape
        assert float((found.double() - right).norm() / right.norm()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_products_round_once_less_than_torchs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    x, gate, up = (torch.randn(size, 160, generator=torch.Generator().manual_seed(size)) for size in (600, 240, 241))
    x, gate, up = x.to(dtype), gate.to(dtype), up[:240].to(dtype)
    if not fuses(x, gate):
        pytest.skip("torch has no oneDNN here")
    exact = F.silu(F.linear(x.double(), gate.double())) * F.linear(x.double(), up.double())

    def error() -> float:
        return float((linear_times(x, up, silu_linear(x, gate)).double() - exact).norm() / exact.norm())

    fused = error()
    monkeypatch.setattr(products, "_onednn_fused", lambda _: False)
    assert not fuses(x, gate) and fused < 1.2 * error()


@pytest.mark.parametrize("recorded", [0, 1, 2])
def test_gradients_of_multiplied_products_are_recorded(recorded: int) -> None:
    tensors = [torch.randn(600, 160), torch.randn(240, 160), torch.randn(600, 240)]
    tensors[recorded].requires_grad_(True)
    linear_times(*tensors).sum().backward()
    assert tensors[recorded].grad is not None
    weight = torch.randn(240, 160, requires_grad=True)
    silu_linear(tensors[0].detach(), weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 16, 100, 513])
def test_prepacked_products_are_the_same_to_the_last_bit(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias, factor = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 384), (512, 384), (512,), (rows, 512))
    )
    packed = prepacked(weight)
    assert packed.is_mkldnn == fuses(x, weight) and packed.nbytes == weight.nbytes
    assert prepacked(packed) is packed and torch.equal(packed.to_dense(), weight)
    assert torch.equal(linear(x, packed, bias), linear(x, weight, bias))
    assert torch.equal(silu_linear(x, packed), silu_linear(x, weight))
    assert torch.equal(linear_times(x, packed, factor), linear_times(x, weight, factor))


def test_gradients_pass_prepacked_matrices() -> None:
    x, weight = torch.randn(3, 384, requires_grad=True), torch.randn(512, 384)
    linear(x, prepacked(weight)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_what_gains_nothing_is_not_prepacked() -> None:
    for weight in (torch.zeros(8, 8), torch.zeros(512, 384, dtype=torch.float16), torch.zeros(512, 384).double()):
        assert prepacked(weight) is weight
    assert prepacked(torch.empty(512, 384, device="meta")).is_meta


def test_parts_of_wider_matrices_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's layer takes hundreds of times as long for them."""
    monkeypatch.setattr(products, "_onednn", lambda _: pytest.fail("asked for"))
    x, weight = torch.randn(600, 416), torch.randn(128, 448)[:, :416]
    torch.testing.assert_close(products.linear(x, weight), x @ weight.T)
