"""Layers that are rounded for a while: in place, and restored to the last bit."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from conftest import make_pico

from ditmoe_cli.compression.replay.rounded_layers import linear, nearest, rounded
from ditmoe_cli.model.dit import Block
from ditmoe_cli.model.experts import SwiGLU, paired, reserve, stacked


@pytest.fixture
def block() -> Block:
    """A block whose experts lie together in memory."""
    block = cast("Block", make_pico(sampler="rf", in_channels=1).model().blocks[0])
    experts = cast("list[SwiGLU]", list(block.moe.experts))
    old = [[layer.weight.detach().clone() for layer in _layers(expert)] for expert in experts]
    reserve(experts, torch.device("cpu"), torch.float32)
    for expert, weights in zip(experts, old, strict=True):
        for layer, weight in zip(_layers(expert), weights, strict=True):
            layer.weight.data.copy_(weight)
    return block


def _layers(expert: SwiGLU) -> list[torch.nn.Linear]:
    return [cast("torch.nn.Linear", layer) for layer in (expert.gate_proj, expert.up_proj, expert.down_proj)]


def test_weights_are_rounded_where_they_lie_and_restored(block: Block) -> None:
    experts = cast("list[SwiGLU]", list(block.moe.experts))
    names = ["moe.experts.0.gate_proj.weight", "moe.experts.1.down_proj.weight", "attn.proj.weight"]
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    with rounded({linear(block, name): "int3-g32" for name in names}):
        assert stacked(experts) is not None and paired(experts[0]) is not None, "the fast way stays open"
        for name, tensor in block.state_dict().items():
            assert torch.equal(tensor, nearest(before[name], "int3-g32") if name in names else before[name])
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert stacked(experts) is not None


def test_weights_are_restored_after_an_error_in_between_and_in_rounding(block: Block) -> None:
    layers = [linear(block, f"moe.experts.{e}.up_proj.weight") for e in (0, 1)]
    before = [layer.weight.detach().clone() for layer in layers]
    with pytest.raises(KeyError), rounded(dict.fromkeys(layers, "int3-g32")):
        raise KeyError
    with pytest.raises(Exception, match="no-such"), rounded({layers[0]: "int3-g32", layers[1]: "no-such"}):
        pass
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
