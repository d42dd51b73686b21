"""Checkpoints of many formats, and plain torch models with their modules, as another program would bring them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from conftest import REPOSITORY, Pico, make_pico
from torch import Tensor, nn

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.base import NumberFormat
from ditmoe_cli.formats.differences import Difference
from ditmoe_cli.formats.registry import pack
from ditmoe_cli.model.checkpoint import Checkpoint


def documented(heading: str) -> dict[str, Any]:
    """What the lines of Python in a section of docs/export.md define."""
    section = (REPOSITORY / "docs" / "export.md").read_text().partition(f"\n## {heading}\n")[2]
    defined: dict[str, Any] = {}
    exec(section.partition("```python\n")[2].partition("```")[0], defined)
    return defined


def mixed_pico(formats: Sequence[str | None], **fields: Any) -> Pico:
    """A pico whose experts' and shared experts' matrices take the formats in turn; None leaves one as it is."""
    pico = make_pico(hidden=64, **fields)
    state: dict[str, Tensor] = {}
    number = 0
    for name, tensor in pico.state.items():
        fmt = None
        if name.endswith("_proj.weight"):
            fmt, number = formats[number % len(formats)], number + 1
        info = TensorInfo(name, "F32", tuple(tensor.shape))
        state |= {name: tensor} if fmt is None else pack(tensor, info, fmt)
    return Pico(pico.config, state)


def bare_model(checkpoint: Checkpoint) -> nn.Module:
    """A model whose quantisable matrices are linear layers of zeros, and all else parameters of the same names."""
    model = nn.Module()
    shapes = {name: weight.info.shape for name, weight in checkpoint.weights.items()}
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        owner = model
        for place, part in enumerate(path):
            if not hasattr(owner, part):
                matrix = shapes.get(".".join((*path, "weight")), ()) if place == len(path) - 1 else ()
                is_linear = len(matrix) == 2 and part not in ("gate", "embedding_table")
                bias = ".".join((*path, "bias")) in shapes
                owner.add_module(part, nn.Linear(matrix[1], matrix[0], bias=bias) if is_linear else nn.Module())
            owner = getattr(owner, part)
        if not isinstance(owner, nn.Linear):
            owner.register_parameter(leaf, nn.Parameter(torch.zeros(shape), requires_grad=False))
    return model.requires_grad_(False)


def exact_values(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """All weights in fp32, before they are rounded to their logical dtypes."""
    found = {}
    for name, weight in checkpoint.weights.items():
        members = {member: checkpoint.reader.tensor(member) for member in weight.members}
        fmt = weight.stored_as
        match fmt:
            case NumberFormat():
                found[name] = fmt.dequantize(weight.info, members)
            case Difference():
                found[name] = fmt.restored(fmt.decoded(weight.info, members), torch.float32)
            case _:
                found[name] = members[name].float()
    return found
