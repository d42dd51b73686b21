"""Stored weights whose parts are trained, for tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from conftest import Pico
from torch import Tensor

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.base import StoredFormat, Weight
from ditmoe_cli.formats.registry import Format, pack
from ditmoe_cli.formats.trained_parts import TrainedPart


def stored_as(weight: Weight) -> StoredFormat:
    """The format of a weight that is not plain."""
    assert weight.stored_as is not None
    return weight.stored_as


def parts_of(weight: Weight, members: Mapping[str, Tensor], codes: bool = True) -> dict[str, TrainedPart]:
    """The trained parts of a weight."""
    fmt = stored_as(weight)
    names = {part: fmt.members(weight.info)[part].name for part in fmt.trained_parts(weight.info, codes)}
    return {part: fmt.trained_part(weight.info, part, members[name]) for part, name in names.items()}


def values_of(weight: Weight, members: Mapping[str, Tensor], codes: bool = True) -> dict[str, Tensor]:
    """The values of the trained parts of a weight before training."""
    names = stored_as(weight).members(weight.info)
    return {part: each.values(members[names[part].name]) for part, each in parts_of(weight, members, codes).items()}


def matrix_of(weight: Weight, members: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
    """The matrix of values, with gradients to them."""
    parts = parts_of(weight, members)
    numbers = {part: parts[part].numbers(value) for part, value in values.items()}
    return stored_as(weight).composition(weight.info, members)(numbers)


def changed(values: Mapping[str, Tensor], seed: int = 0, by: float = 0.3) -> dict[str, Tensor]:
    """Values as training might leave them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        part: value * (1 + by * torch.randn(value.shape, generator=generator))
        + by * torch.randn(value.shape, generator=generator)
        for part, value in values.items()
    }


def written(weight: Weight, members: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All members of a weight, those that are trained as they are written of values."""
    names, parts = stored_as(weight).members(weight.info), parts_of(weight, members)
    return {**members, **{names[part].name: parts[part].stored(value) for part, value in values.items()}}


def wholly_packed(pico: Pico, fmt: Format) -> Pico:
    """The pico with the matrices of all linear layers but routers stored in a format."""
    state: dict[str, Tensor] = {}
    for name, tensor in pico.state.items():
        plain = tensor.dim() != 2 or name.endswith("gate.weight") or name.startswith(("y_embedder", "pos_embed"))
        state |= {name: tensor} if plain else pack(tensor, TensorInfo(name, "F32", tuple(tensor.shape)), fmt)
    return Pico(pico.config, state)
