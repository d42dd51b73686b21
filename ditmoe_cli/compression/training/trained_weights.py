"""Which weights of a model are trained, and what their training leaves to be written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from ditmoe_cli.model.loading import put


def trainable(model: nn.Module, prefix: str, names: Collection[str]) -> dict[str, Tensor]:
    """Return the weights of a model, or of a part of it whose names begin with `prefix`, that are to be trained.

    They are made fp32 and record gradients from now on. Weights that stay packed are left out.
    """
    found: dict[str, Tensor] = {}
    own = {f"{prefix}{name}": name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for name in names:
        if name not in own:
            continue
        value = _value(model, own[name])
        if value.dtype != torch.float32:
            put(model, own[name], value.float())
        found[name] = _value(model, own[name]).requires_grad_(True)
    return found


def _value(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    value = module._parameters.get(leaf)
    found = module._buffers.get(leaf) if value is None else value
    assert found is not None
    return found


Stored = Callable[[str, Tensor], Tensor]
"""Takes a weight's name and its value, and returns it in the dtype that it is written in."""


def rounded_as_stored(weights: Mapping[str, Tensor], stored: Stored) -> None:
    """Round weights in place to what is written of them."""
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(stored(name, weight.detach()))
