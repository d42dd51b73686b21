"""Layers temporarily rounded to the nearest values of a format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.names import in_block
from ditmoe_cli.formats.registry import grid_of
from ditmoe_cli.model.dit import Block


def nearest(weight: Tensor, fmt: str) -> Tensor:
    """Return a weight (out, in) rounded to the nearest values of a format."""
    columns = torch.arange(weight.shape[1], device=weight.device)
    return grid_of(weight.float(), fmt).round(weight.float(), columns)


def require_range(weights: Mapping[str, Tensor]) -> None:
    """Raise `BadInputError` where one of some weights, by name, holds values beyond the fp16 scales of a mix's formats.

    The device is asked once for all of them.
    """
    if not weights:
        return
    largest = torch.stack([torch.linalg.vector_norm(weight, float("inf")).float() for weight in weights.values()])
    for name, size in zip(weights, largest.tolist(), strict=True):
        if not size <= torch.finfo(torch.float16).max:
            raise BadInputError(
                f"tensor {name!r} holds values above fp16's range, which scales are stored in; protect it"
            )


@contextmanager
def rounded(layers: Mapping[nn.Linear, str]) -> Iterator[None]:
    """Round linear layers to formats in place, so that experts lie together as before; restore them at the end."""
    kept: dict[nn.Linear, Tensor] = {}
    try:
        for layer, fmt in layers.items():
            rounded_weight = nearest(layer.weight.data, fmt)
            kept[layer] = layer.weight.data.clone()
            layer.weight.data.copy_(rounded_weight)
        yield
    finally:
        for layer, weight in kept.items():
            layer.weight.data.copy_(weight)


def linear(block: Block, name: str) -> nn.Linear:
    """Return the layer of a weight, named within its block."""
    layer = block.get_submodule(name.removesuffix(".weight"))
    assert isinstance(layer, nn.Linear)
    return layer


def layers_of(block: Block, index: int, formats: Mapping[str, str]) -> dict[nn.Linear, str]:
    """Return the formats of block `index` by layer, from those by the names of its weights.

    Raises `BadInputError` where `require_range` does.
    """
    layers = {name: linear(block, name.removeprefix(in_block(index, ""))) for name in formats}
    require_range({name: layer.weight for name, layer in layers.items()})
    return {layer: formats[name] for name, layer in layers.items()}
