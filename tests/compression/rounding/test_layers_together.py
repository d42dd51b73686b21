"""Layers rounded in place: those of equal shapes together, as memory allows, and those of different rules apart."""

from __future__ import annotations

import pytest
import torch
from swiglu import seeded
from torch import nn
from torch.testing import assert_close

from ditmoe_cli.compression.rounding import layers_together
from ditmoe_cli.compression.rounding.layers_together import Reading, grouped, round_layers

FORMATS = (("int4-g32", "int3-g64"), ("int8", "int5-g32"), ("nf4", "ternary-g64"))


def readings() -> list[Reading]:
    """Three experts with two layers each, whose formats have one rule or two."""
    found = []
    for e, fmts in enumerate(FORMATS):
        layers = {f"{e}.{m}": nn.Linear(64, 8, bias=False).requires_grad_(False) for m in range(2)}
        for m, layer in enumerate(layers.values()):
            layer.weight.copy_(torch.randn(8, 64, generator=seeded(10 * e + m)))
        inputs = torch.randn(300, 64, generator=seeded(e)) @ torch.randn(64, 64, generator=seeded(e + 50))
        held = (torch.arange(300) % 8 == 7).float()
        formats = dict(zip(layers, fmts, strict=True))
        found.append(Reading(layers, formats, inputs.__getitem__, 1 - held, None, held))
    return found


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_how_many_are_rounded_together_changes_nothing(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_together, "ROUNDED_BYTES", limit)
    done = {layer.name: layer for reading in readings() for layer in round_layers([reading])}
    ours = readings()
    before = {name: layer.weight.clone() for reading in ours for name, layer in reading.layers.items()}
    together = {layer.name: layer for layer in round_layers(ours)}
    assert together.keys() == done.keys() == before.keys()
    for reading in ours:
        for name, layer in reading.layers.items():
            assert torch.equal(layer.weight, together[name].rounded.weight), "in place"
            assert not torch.equal(layer.weight, before[name])
            assert_close(layer.weight, done[name].rounded.weight)
            assert together[name].rounded.error <= 1
            assert_close(together[name].grid.round(layer.weight, torch.arange(64)), layer.weight)


def test_equal_keys_are_grouped_in_the_order_of_the_first() -> None:
    assert grouped([3, 1, 5, 2, 4], lambda number: number % 2) == [[3, 1, 5], [2, 4]]
