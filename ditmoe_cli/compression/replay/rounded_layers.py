"""Layers rounded to the nearest values of a format, for a while."""

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


def require_range(weight: Tensor, name: str) -> None:
    """Raise `BadInputError` where a weight holds values that fp16 scales cannot tell, which formats of a mix have."""
    if not bool(weight.abs().amax() <= torch.finfo(torch.float16).max):
        raise BadInputError(f"tensor {name!r} holds values above fp16's range, which scales are stored in; protect it")


@contextmanager
def rounded(layers: Mapping[nn.Linear, str]) -> Iterator[None]:
    """Round linear layers to formats for a while."""
    kept = {layer: layer.weight.data for layer in layers}
    for layer, fmt in layers.items():
        layer.weight.data = nearest(kept[layer], fmt).to(kept[layer].dtype)
    try:
        yield
    finally:
        for layer, weight in kept.items():
            layer.weight.data = weight


def linear(block: Block, name: str) -> nn.Linear:
    """Return the layer of a weight, named within its block."""
    found = block.get_submodule(name.removesuffix(".weight"))
    assert isinstance(found, nn.Linear)
    return found


def layers_of(block: Block, index: int, formats: Mapping[str, str]) -> dict[nn.Linear, str]:
    """Return formats by the layers of block `index`, given by its weights' names.

    Raises `BadInputError` for values that scales cannot tell.
    """
    found = {}
    for name, fmt in formats.items():
        layer = linear(block, name.removeprefix(in_block(index, "")))
        require_range(layer.weight, name)
        found[layer] = fmt
    return found
