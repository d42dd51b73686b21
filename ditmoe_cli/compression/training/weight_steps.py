"""The steps of a run: AdamW of most weights, `matrix_steps` of matrices, rates relative to what they change.

The rate of a weight is relative to size(w), the root mean square of the weight before training, rounded to a power of
two, at least `LEAST_SIZE`; so one rate suits models of all widths. Weights whose size says nothing of what they change,
as those that begin at 0, are given one. The rate of matrices is `MATRIX_RATE` times that of AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ditmoe_cli.compression.training.dividing import buckets
from ditmoe_cli.compression.training.matrix_steps import MatrixSteps, SteppedMatrix

LEAST_SIZE = 2.0**-10
MATRIX_RATE = 5.0
_BETAS = (0.9, 0.99)
_AT_ONCE = 2**24  # values that AdamW changes at once, unless one weight has more


@dataclass(frozen=True)
class Stepping:
    """How some weights step otherwise than by their own size and AdamW, by name.

    Attributes:
        sizes: what rates are relative to, in place of their own size.
        matrices: weights that step as matrices, and how many each is (`stepped_matrices`).
    """

    sizes: Mapping[str, float] = field(default_factory=dict)
    matrices: Mapping[str, int] = field(default_factory=dict)


USUAL = Stepping()


@dataclass
class WeightSteps:
    """The steps of weights by name, leaves with gradients; `workers` threads of a CPU share what is divided."""

    weights: Mapping[str, Tensor]
    stepping: Stepping = USUAL
    workers: int = 1
    _matrices: MatrixSteps = field(init=False)
    _adam: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        sizes = {name: self.stepping.sizes.get(name) or _size(weight) for name, weight in self.weights.items()}
        sizes = {name: 2.0 ** round(math.log2(max(size, LEAST_SIZE))) for name, size in sizes.items()}
        matrices = {
            name: SteppedMatrix(weight, torch.zeros_like(weight), self.stepping.matrices[name], sizes[name])
            for name, weight in self.weights.items()
            if self.stepping.matrices.get(name)
        }
        self._matrices = MatrixSteps(matrices, self.workers)
        others = {name: weight for name, weight in self.weights.items() if name not in matrices}
        groups = _groups(others, sizes) or [{"params": [torch.zeros(1)], "lr": 0.0}]  # torch refuses none
        self._adam = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0, foreach=True)
        self._rates = [float(group["lr"]) for group in self._adam.param_groups]

    def step(self, rate: float) -> None:
        """Take a step by the weights' gradients."""
        for group, relative in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = relative * rate
        self._adam.step()
        self._matrices.step(MATRIX_RATE * rate)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Return what going on takes, by moment and weight: all have a first one, those of AdamW a second."""
        matrices = {name: matrix.momentum for name, matrix in self._matrices.weights.items()}
        state = {name: self._adam.state[weight] for name, weight in self.weights.items() if name not in matrices}
        first = {name: each["exp_avg"] for name, each in state.items()}
        return {"first": matrices | first, "second": {name: each["exp_avg_sq"] for name, each in state.items()}}

    def go_on(self, step: int, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up the moments of an earlier run, behind `step` steps."""
        for name, weight in self.weights.items():
            first = moments["first"][name].to(weight.device)
            if name in self._matrices.weights:
                self._matrices.weights[name].momentum.copy_(first)
                continue
            second = moments["second"][name].to(weight.device)
            self._adam.state[weight] = {
                "step": torch.tensor(float(step)),
                "exp_avg": first,
                "exp_avg_sq": second,
            }


def _size(weight: Tensor) -> float:
    return float(weight.detach().float().square().mean().sqrt())


def _groups(weights: Mapping[str, Tensor], sizes: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return weights in groups of one size each, whose learning rate that is.

    AdamW's temporaries are those of a group at a time, so a group ends where it would have more than `_AT_ONCE` values.
    """
    alike: dict[float, list[Tensor]] = {}
    for name, weight in weights.items():
        alike.setdefault(sizes[name], []).append(weight)
    return [
        {"params": members, "lr": size}
        for size, same in sorted(alike.items())
        for members in buckets(same, Tensor.numel, _AT_ONCE)
    ]
