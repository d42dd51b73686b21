"""Training by updates of low rank: of a matrix W, B (out, R) and A (R, in) are trained, and W + B A is written.

Each step computes W x + B (A x), so that no gradient of a whole matrix is ever held. What is judged is W + B A, rounded
to what is written of it.

Values of A are drawn from N(0, 1 / in), and those of B begin at 0. Then a step of B changes an entry of W by about
√(R / in) times as much as an entry of B, so that the rate of B is relative to size(W) √(in / R), that of A to its own
size: W changes as fast as if it were trained itself, and B by √(in / R) times faster than A, as in LoRA+ (Hayou et al.
2024, https://arxiv.org/abs/2402.12354). LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

import torch
from torch import Tensor, nn

from ditmoe_cli.compression.training.trained_weights import Stored, rounded_as_stored
from ditmoe_cli.compression.training.weight_steps import Stepping
from ditmoe_cli.formats.products import linear
from ditmoe_cli.model.linear import Linear

UP, DOWN = "low_rank.up", "low_rank.down"  # what follows a weight's name


class LowRankLinear(nn.Module):
    """A linear layer of the matrix W + B A, with gradients to B, A and the bias alone.

    Without gradients its matrix is rounded to what is written of it.
    """

    def __init__(self, layer: Linear, down: Tensor, rounded: Callable[[Tensor], Tensor]) -> None:
        """Take over a layer, A (R, in), and what rounds a matrix; B is 0."""
        super().__init__()
        self.layer, self._rounded = layer, rounded
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(down.new_zeros(len(layer.weight), len(down)))

    def matrix(self) -> Tensor:
        """Return W + B A (out, in), rounded to what is written of it, without gradients."""
        weight = self.layer.weight.detach()
        return self._rounded(torch.addmm(weight, self.up.detach(), self.down.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (W + B A)ᵀ + b in the dtype of x (..., in)."""
        if torch.is_grad_enabled():
            out: Tensor = self.layer(x)
            return out + linear(linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        bias = None if self.layer.bias is None else self.layer.bias.to(x.dtype)
        return linear(x, self.matrix().to(x.dtype), bias)


@dataclass(frozen=True)
class Updates:
    """The weights of a model that are trained, by name: some as they are, of others an update of low rank.

    Attributes:
        whole: weights that are trained as they are.
        layers: the layers of the others.
        stored: rounds a weight to what is written of it.
        matrices: those that step as matrices where they are trained as they are, and how many each is.
    """

    whole: Mapping[str, Tensor]
    stored: Stored
    layers: Mapping[str, LowRankLinear] = field(default_factory=dict)
    matrices: Mapping[str, int] = field(default_factory=dict)

    def trained(self) -> dict[str, Tensor]:
        """Return all that is trained, by name, leaves that record gradients."""
        ups = {f"{name}.{UP}": layer.up for name, layer in self.layers.items()}
        return {**self.whole, **ups, **{f"{name}.{DOWN}": layer.down for name, layer in self.layers.items()}}

    def stepping(self) -> Stepping:
        """Return how they step: the rate of each B relative to size(W) √(in / R), and some as matrices."""
        sizes = {
            f"{name}.{UP}": float(layer.layer.weight.square().mean().sqrt())
            * (layer.down.shape[1] / layer.down.shape[0]) ** 0.5
            for name, layer in self.layers.items()
        }
        matrices = {name: self.matrices[name] for name in self.whole if name in self.matrices}
        return Stepping(sizes, matrices)

    def round(self) -> None:
        """Round weights that are trained as they are, in place, to what is written of them."""
        rounded_as_stored(self.whole, self.stored)

    def written(self) -> dict[str, Tensor]:
        """Return the values of all weights as they are written, updates merged into their matrices, on the CPU."""
        merged = {name: layer.matrix().cpu() for name, layer in self.layers.items()}
        return {name: weight.detach() for name, weight in self.whole.items()} | merged


def low_rank_updates(
    model: nn.Module, prefix: str, weights: Mapping[str, Tensor], names: Mapping[str, int], stored: Stored, seed: int
) -> Updates:
    """Return the updates that train `weights` of a model, or of a part of it whose names begin with `prefix`.

    `names` gives the ranks of those that are trained by updates; their layers take the places of those in the model.
    The values of A are drawn by `seed` and name.
    """
    layers: dict[str, LowRankLinear] = {}
    for name in [name for name in weights if name in names]:
        path, rank = name.removeprefix(prefix).removesuffix(".weight"), names[name]
        layer = model.get_submodule(path)
        assert isinstance(layer, Linear)
        weight = layer.weight.requires_grad_(False)
        layers[name] = LowRankLinear(layer, _drawn(rank, weight, f"{seed}.{name}"), _rounding(stored, name))
        setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], layers[name])
    return Updates({name: weight for name, weight in weights.items() if name not in layers}, stored, layers)


def _drawn(rank: int, weight: Tensor, key: str) -> Tensor:
    """Return A (R, in) of N(0, 1 / in), the same on all devices."""
    seed = int.from_bytes(sha256(key.encode()).digest()[:8], "little") % 2**63
    values = torch.randn(rank, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    return values.div_(weight.shape[1] ** 0.5).to(weight.device)


def _rounding(stored: Stored, name: str) -> Callable[[Tensor], Tensor]:
    return lambda matrix: stored(name, matrix)
