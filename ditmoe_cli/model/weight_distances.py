"""How far the weights of two checkpoints are apart, whatever they are stored in: ‖B − A‖ / ‖A‖ by group and block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from ditmoe_cli.files.header import FLOATING
from ditmoe_cli.files.names import ROUTER, split_name
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.parameters import group_of
from ditmoe_cli.progress import each


@dataclass
class Distance:
    """‖B − A‖² and ‖A‖² of weights, summed in fp64, by block; None is outside of blocks. `weights` counts them."""

    squares: dict[int | None, tuple[float, float]]
    weights: int = 0

    @property
    def relative(self) -> float | None:
        """‖B − A‖ / ‖A‖ over all blocks; None where A's weights are zero and B's are not."""
        return _relative(*map(sum, zip(*self.squares.values(), strict=True)))

    @property
    def by_block(self) -> dict[int, float | None]:
        """The same of each block."""
        return {block: _relative(*pair) for block, pair in self.squares.items() if block is not None}


def _relative(difference: float, norm: float) -> float | None:
    return sqrt(difference / norm) if norm else None if difference else 0.0


def distances(a: Checkpoint, b: Checkpoint, pairs: Mapping[str, tuple[Weight, Weight]]) -> dict[str, Distance]:
    """Return the distances of weights by group: routed and shared experts, router, attention, modulation and others.

    `pairs` are A's and B's weights by name, of one logical shape. Weights are unpacked one at a time. Raises
    `BadInputError` that names a tensor which holds NaN or infinite values.
    """
    found: dict[str, Distance] = {}
    for name, (left, right) in each(pairs.items(), "measuring differences", "weights"):
        if left.info.dtype not in FLOATING or right.info.dtype not in FLOATING:
            continue
        x, y = _values(a, left), _values(b, right)
        pair = _square(y - x), _square(x)
        group = found.setdefault(_group(name), Distance({}))
        group.weights += 1
        block = split_name(name).block
        before = group.squares.get(block, (0.0, 0.0))
        group.squares[block] = before[0] + pair[0], before[1] + pair[1]
    return found


def _values(checkpoint: Checkpoint, weight: Weight) -> Tensor:
    return weight.unpack({name: checkpoint.finite_tensor(name) for name in weight.members}).float()


def _square(values: Tensor) -> float:
    """Return the sum of squares, each row's in fp32 and their sum in fp64, without a copy of the whole in fp64."""
    flat = values.reshape(len(values), -1) if values.dim() > 1 else values.reshape(1, -1)
    return float(torch.linalg.vector_norm(flat, dim=1).double().square().sum())


def _group(name: str) -> str:
    group = group_of(name)
    return group or ("router" if split_name(name).rest == ROUTER else "others")
