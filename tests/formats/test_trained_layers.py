"""Linear layers whose stored weights are trained: what they compute, and where gradients go."""

from __future__ import annotations

import pytest
import torch
from packed import KINDS, info_of, random, weight_of
from stored_parts import parts_of, stored_as, values_of, written
from torch import Tensor, nn

from ditmoe_cli.formats.layers import PackedLinear
from ditmoe_cli.formats.registry import Format, pack
from ditmoe_cli.formats.trained_layers import TrainedLinear


def layers(fmt: Format) -> tuple[PackedLinear, TrainedLinear]:
    weight, members = weight_of(random((6, 96)), fmt), pack(random((6, 96)), info_of(random((6, 96))), fmt)
    own = PackedLinear(weight, members, bias=True)
    own.bias = nn.Parameter(torch.linspace(-1, 1, 6), requires_grad=False)
    values, parts = values_of(weight, members, codes=False), parts_of(weight, members, codes=False)
    trained = {part: (each, nn.Parameter(values[part])) for part, each in parts.items()}
    return own, TrainedLinear(trained, stored_as(weight).composition(weight.info, members), own.bias)


@pytest.mark.parametrize("fmt", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_training_it_computes_what_the_packed_layer_computes(fmt: Format, dtype: torch.dtype) -> None:
    packed, trained = layers(fmt)
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.inference_mode():
        assert torch.equal(trained(x), packed(x))


@pytest.mark.parametrize("fmt", KINDS)
def test_gradients_reach_the_input_and_the_parts_through_layers_in_a_row(fmt: Format) -> None:
    """Each layer's matrix stays until gradients have passed, though the next is put together after it."""
    packed, trained = layers(fmt)
    first = torch.randn(4, 96, generator=torch.Generator().manual_seed(2), requires_grad=True)
    other = torch.randn(6, 96, generator=torch.Generator().manual_seed(3))
    (trained(trained(first) @ other)).square().sum().backward()
    x = first.detach().clone().requires_grad_(True)
    matrix, bias = packed.weight(), packed.bias
    ((x @ matrix.T + bias) @ other @ matrix.T + bias).square().sum().backward()  # type: ignore[no-untyped-call]
    assert first.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(first.grad, x.grad, rtol=1e-4, atol=1e-4 * float(x.grad.abs().max()))
    for name, parameter in trained.named_parameters():
        assert name == "bias" or (parameter.grad is not None and bool(parameter.grad.any()))


@pytest.mark.parametrize("fmt", ["int2-g32", "int3-g64-sym", "int4-g32"])
def test_codes_that_are_wrong_are_learned(fmt: Format) -> None:
    """Some codes are moved by one; trained on what the right ones give, most come back, and scales alone do worse."""
    generator = torch.Generator().manual_seed(7)
    matrix = torch.randn(6, 96, generator=generator) / 10
    weight, right = weight_of(matrix, fmt), pack(matrix, info_of(matrix), fmt)
    before = values_of(weight, right)
    wrong = (torch.rand(6, 96, generator=generator) < 0.1).float() * (1 - 2 * (before["packed"] > 0).float())
    members = written(weight, right, before | {"packed": before["packed"] + wrong})
    x = torch.randn(512, 96, generator=generator)
    expected = x @ weight.unpack(right).float().T

    def trained(codes: bool) -> tuple[float, dict[str, Tensor]]:
        parts = parts_of(weight, members, codes)
        values = {part: nn.Parameter(value) for part, value in values_of(weight, members, codes).items()}
        layer = TrainedLinear(
            {part: (parts[part], values[part]) for part in parts},
            stored_as(weight).composition(weight.info, members),
            None,
        )
        optimizer = torch.optim.Adam(values.values(), lr=0.02)
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 200)
            optimizer.zero_grad()
            (layer(x) - expected).square().sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            rounded = {part: parts[part].rounded(value) for part, value in values.items()}
            return float((layer(x) - expected).square().sum()), rounded

    error, learned = trained(codes=True)
    assert error < 0.3 * trained(codes=False)[0]
    off = (learned["packed"] != before["packed"]).sum()
    assert off < 0.5 * (wrong != 0).sum()
