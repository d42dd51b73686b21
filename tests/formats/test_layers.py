"""Layers that keep their weights packed: what they compute, and what they leave as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import KINDS, dequantized, found, in_pieces, info_of, random, same_bytes, weight_of
from torch import Tensor

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.layers import PackedLinear
from ditmoe_cli.formats.pieces import Pieces
from ditmoe_cli.formats.registry import FORMATS, Format, pack, quantized_members

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def layer_of(weight: Tensor, fmt: Format, bias: bool = False) -> PackedLinear:
    return PackedLinear(weight_of(weight, fmt), pack(weight, info_of(weight), fmt), bias)


@pytest.mark.parametrize("fmt", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layer_multiplies_by_the_unpacked_weight(fmt: Format, dtype: torch.dtype) -> None:
    """And leaves its members, its state and its bias as they were."""
    weight, x = random((6, 96)), torch.randn(4, 96).to(dtype)
    described, members = weight_of(weight, fmt), pack(weight, info_of(weight), fmt)
    copies = {name: value.clone() for name, value in members.items()}
    layer = PackedLinear(described, members, bias=True).eval()
    bias = torch.linspace(-1, 1, 6) / 3
    layer.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
    assert (layer.weight().dtype, layer.weight().shape) == (torch.float32, (6, 96))
    assert torch.equal(layer.weight(), dequantized(described, members))
    expected = x @ layer.weight().to(dtype).T + bias.to(dtype)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    first = layer(x)
    torch.testing.assert_close(first, expected, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)
    assert torch.equal(layer(x), first)
    assert all(same_bytes(value, copies[name]) for name, value in members.items()), "members"
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items()), "state"
    assert layer.bias.dtype == torch.float32, "the bias is not cast in place"


@pytest.mark.parametrize("fmt", KINDS)
def test_casting_moving_and_copying_the_layer_rounds_nothing_that_is_packed(fmt: Format) -> None:
    layer, x = layer_of(random((6, 96)), fmt), torch.randn(4, 96)
    unrounded, before = layer.weight(), layer(x)
    for other in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        assert torch.equal(layer.to(other).weight(), unrounded)
    assert torch.equal(layer.float().to("cpu")(x), before)
    assert torch.equal(copy.deepcopy(layer)(x), before)
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@given(fmt=st.sampled_from(FORMATS))
def test_the_layer_takes_the_memory_of_its_members(fmt: Format) -> None:
    weight = random((64, 320))
    held = sum(buffer.nbytes for buffer in layer_of(weight, fmt).buffers())
    stored = sum(member.nbytes for member in quantized_members(info_of(weight), fmt))
    assert held <= stored + 2048, "a table of 256 pairs is all that it adds"


@pytest.mark.parametrize("fmt", KINDS)
@pytest.mark.parametrize("shape", [(33, 96), (5, 130)])
def test_no_multiples_are_needed_and_fp32_is_computed_in_fp32(fmt: Format, shape: tuple[int, int]) -> None:
    layer, x = layer_of(random(shape), fmt).eval(), torch.randn(8, shape[1])
    exact = x.double() @ layer.weight().double().T
    assert (layer(x) - exact).norm() / exact.norm() < 1e-6


@given(drawn=in_pieces(), bias=st.booleans())
def test_a_layer_in_pieces_multiplies_by_the_whole(drawn: tuple[Tensor, TensorInfo, Pieces], bias: bool) -> None:
    weight, info, cut = drawn
    members = pack(weight, info, cut.name)
    layer = PackedLinear(found(members), members, bias)
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(info.shape[0]), requires_grad=False)
    x, whole = torch.randn(3, info.shape[1]), dequantized(found(members), members)
    assert torch.equal(layer.weight(), whole)
    torch.testing.assert_close(layer(x), x @ whole.T + (layer.bias if bias else 0))
    assert torch.equal(copy.deepcopy(layer).to(torch.bfloat16).weight(), whole), "casting rounds nothing"
    stored = sum(member.nbytes for member in quantized_members(info, cut.name))
    assert sum(buffer.nbytes for buffer in layer.buffers()) == stored - 8 * len(cut.counts), "all but the shapes"
