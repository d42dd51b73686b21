"""The trained tensors of a checkpoint in a model, and what their training leaves to be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ditmoe_cli.compression.training.stepped_matrices import stacked_matrices
from ditmoe_cli.compression.training.trained_tensors import TrainedSize, TrainedTensor, trained_size
from ditmoe_cli.files.reader import torch_dtype
from ditmoe_cli.formats.base import StoredFormat, Weight
from ditmoe_cli.formats.trained_layers import TrainedLinear
from ditmoe_cli.formats.trained_parts import Cast, TrainedPart
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.loading import put

Stored = Callable[[str, Tensor], Tensor]
"""Takes a trained tensor's name and its values, and returns those that stand for what is written of them."""


@dataclass(frozen=True)
class TrainedTensors:
    """The stored tensors of a checkpoint that are trained, by name."""

    checkpoint: Checkpoint
    tensors: Mapping[str, TrainedTensor]
    _parts: dict[str, TrainedPart] = field(default_factory=dict)

    @property
    def size(self) -> TrainedSize:
        """The size of what is trained."""
        return trained_size(self.checkpoint, self.tensors)

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks of the updates that train matrices, by name."""
        return {name: tensor.rank for name, tensor in self.tensors.items() if tensor.rank is not None}

    @property
    def matrices(self) -> dict[str, int]:
        """How many matrices each weight is that can step as such (`matrix_steps`), by name; others are left out."""
        found = {name: stacked_matrices(name, tensor.shape) for name, tensor in self.tensors.items() if tensor.is_whole}
        return {name: count for name, count in found.items() if count}

    def in_model(self, model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
        """Return the values of those that are in a model of the checkpoint, or in a part of it, whose names begin so.

        They are fp32, and record gradients from now on. A weight that is stored otherwise than plain, of which they are
        parts, becomes a `TrainedLinear`; and so does one that stays packed and is not trained, since what it is
        unpacked to has to stay until gradients have passed. `rounded` knows them until the next call.
        """
        self._parts.clear()
        found = self._layers(model, prefix)
        own = {f"{prefix}{name}": name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        for name, trained in self.tensors.items():
            if trained.part is not None or name not in own:
                continue
            value = _value(model, own[name])
            if value.dtype != torch.float32:
                put(model, own[name], value.float())
            found[name] = _value(model, own[name])
            self._parts[name] = Cast(torch_dtype(trained.weight.info.dtype))
        return {name: found[name].requires_grad_(True) for name in self.tensors if name in found}

    def rounded(self, name: str, values: Tensor) -> Tensor:
        """Return values of a tensor of the model that `in_model` was given, rounded to those that are written."""
        return self._parts[name].rounded(values)

    def stored(self, name: str, values: Tensor) -> Tensor:
        """Return the tensor, on the CPU, that is written of values."""
        trained, tensor = self.tensors[name], self.checkpoint.finite_tensor(name)
        weight = trained.weight
        if weight.stored_as is None or trained.part is None:
            return Cast(tensor.dtype).stored(values.cpu())
        return weight.stored_as.trained_part(weight.info, trained.part, tensor).stored(values.cpu())

    def _layers(self, model: nn.Module, prefix: str) -> dict[str, Tensor]:
        """Put layers in the places of stored weights; return the values of the trained ones, by name."""
        device = next(iter((*model.parameters(), *model.buffers()))).device
        values: dict[str, nn.Parameter] = {}
        for name, weight in self.checkpoint.weights.items():
            if weight.stored_as is None or not name.startswith(prefix):
                continue
            names = self._names(weight, weight.stored_as)
            if not weight.quantized and not any(stored in self.tensors for stored in names.values()):
                continue
            members = {member: self.checkpoint.finite_tensor(member).to(device) for member in weight.members}
            for part, stored in names.items():
                if stored not in values:
                    self._parts[stored] = weight.stored_as.trained_part(weight.info, part, members[stored])
                    first = self._parts[stored].values(members[stored]).clone()
                    values[stored] = nn.Parameter(first, requires_grad=False)
            module = name.removeprefix(prefix).removesuffix(".weight")
            layer = TrainedLinear(
                {part: (self._parts[stored], values[stored]) for part, stored in names.items()},
                weight.stored_as.composition(weight.info, members),
                cast("nn.Parameter | None", model.get_submodule(module).bias),
            )
            setattr(model.get_submodule(module.rpartition(".")[0]), module.rpartition(".")[2], layer)
        return {name: value for name, value in values.items() if name in self.tensors}

    def _names(self, weight: Weight, stored_as: StoredFormat) -> dict[str, str]:
        """Return the names of a weight's parts that its layer needs: all but codes that are not trained."""
        members = stored_as.members(weight.info)
        needed = stored_as.trained_parts(weight.info)
        parts = stored_as.trained_parts(weight.info, codes=True)
        return {part: members[part].name for part in parts if part in needed or members[part].name in self.tensors}


def _value(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    value = module._parameters.get(leaf)
    found = module._buffers.get(leaf) if value is None else value
    assert found is not None
    return found


def rounded_as_stored(weights: Mapping[str, Tensor], stored: Stored) -> None:
    """Round weights in place to what is written of them."""
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(stored(name, weight.detach()))
