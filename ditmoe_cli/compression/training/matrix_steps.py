"""Steps of matrices, all of whose directions are as large (Muon).

Of a matrix with gradient g, where orth(u) has the singular vectors of u, and values of 1:

    m <- μ m + (1 - μ) g
    u  = μ m + (1 - μ) g
    w <- w - rate · 0.2 √max(rows, columns) · orth(u)

Such a step is about as large as AdamW's in its root mean square. AdamW's follows the few directions that most gradients
have, and is slow in all others: where targets have no noise, as those of an original have none, these are what is left.

orth(u) is approximated: X <- a X + (b A + c A²) X with A = X Xᵀ, five times from u / ‖u‖, leaves values of 0.7 to 1.2
(its operations: `stepped_matrices`). Matrices of one shape are computed together: ``torch.optim.Muon`` takes one at a
time, and twice as long on narrow models.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; sizes of steps: Liu et al. 2025,
https://arxiv.org/abs/2502.16982.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditmoe_cli.compression.training.dividing import buckets, dealt
from ditmoe_cli.compression.training.side_by_side import side_by_side
from ditmoe_cli.compression.training.stepped_matrices import ROUNDS

MOMENTUM = 0.9  # μ
_AS_LARGE = 0.2
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c
_AT_ONCE = 2**24  # values of matrices that are computed together, unless one has more


@dataclass(frozen=True)
class SteppedMatrix:
    """A weight (rows, columns) of `count` matrices, m of it, and the size that its rate is relative to."""

    weight: Tensor
    momentum: Tensor
    count: int
    size: float

    @property
    def shape(self) -> tuple[int, int]:
        """That of one of its matrices."""
        return self.weight.shape[0] // self.count, self.weight.shape[1]


@dataclass
class MatrixSteps:
    """The steps of some weights; `workers` threads of a CPU share them."""

    weights: Mapping[str, SteppedMatrix]
    workers: int = 1
    _shares: list[list[list[SteppedMatrix]]] = field(init=False)

    def __post_init__(self) -> None:
        by_shape: dict[tuple[int, int], list[SteppedMatrix]] = {}
        for each in self.weights.values():
            by_shape.setdefault(each.shape, []).append(each)
        groups = [group for alike in by_shape.values() for group in buckets(alike, _values, _AT_ONCE)]
        shares = dealt({place: _work(group) for place, group in enumerate(groups)}, self.workers)
        self._shares = [[groups[place] for place in shares if shares[place] == one] for one in range(self.workers)]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Take a step by the weights' gradients."""

        def stepped(groups: Sequence[Sequence[SteppedMatrix]]) -> None:
            for group in groups:
                _step(group, rate)

        side_by_side(stepped, self._shares)


def _values(matrix: SteppedMatrix) -> int:
    return matrix.weight.numel()


def _work(group: Sequence[SteppedMatrix]) -> int:
    return sum(_values(each) * min(each.shape) for each in group)


def _step(group: Sequence[SteppedMatrix], rate: float) -> None:
    """Take a step of weights of matrices of one shape."""
    rows, columns = group[0].shape
    steps = []
    for each in group:
        gradient = each.weight.grad
        assert gradient is not None
        each.momentum.lerp_(gradient, 1 - MOMENTUM)
        steps.append(gradient.lerp(each.momentum, MOMENTUM).reshape(each.count, rows, columns))
    found = orthogonal(torch.cat(steps)).mul_(_AS_LARGE * max(rows, columns) ** 0.5)
    for each, part in zip(group, torch.split(found, [each.count for each in group]), strict=True):
        each.weight.sub_(part.reshape(each.weight.shape).to(each.weight.dtype), alpha=rate * each.size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Return matrices (n, rows, columns) of the same singular vectors, and values of 0.7 to 1.2 where they were not 0.

    They are computed in bf16 on a GPU, whose error is far less than that of the values.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices.clone()
    high = x.shape[-2] > x.shape[-1]
    if high:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-20)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if high else x).float()
