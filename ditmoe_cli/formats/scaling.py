"""Scales in fp16: arithmetic that the formats share whose scales belong to groups of columns or to rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats.packing import row_chunk
from ditmoe_cli.formats.scratch import scratch

HALF_MAX = torch.finfo(torch.float16).max
SCALE_ERROR = 2.0**-8  # by which the rounding of scales alone may change a weight, relative to its norm: bf16's step


def over_rows(weight: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `function` of all rows, computed a few rows at a time."""
    return torch.cat([function(part) for part in row_chunks(weight)])


def row_chunks(weight: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of a weight (out, in), as many together as should be worked on at a time."""
    return torch.split(weight, row_chunk(weight.shape[0], weight.shape[1], weight.device))


def largest_of_rows(weight: Tensor) -> Tensor:
    """Return the largest |w| of each row of a weight (out, in), in fp32; NaN of a row that holds one."""
    return over_rows(weight, _largest)


def _largest(part: Tensor) -> Tensor:
    if part.dtype in (torch.float16, torch.bfloat16):  # whose bits without the sign are ordered as sizes are
        return (part.view(torch.int16) & 0x7FFF).amax(dim=1).view(part.dtype).float()
    return part.float().abs().amax(dim=1)


@dataclass(frozen=True)
class Extents:
    """The least and the largest value of each group, and 0: `low` ≤ 0 ≤ `high` (rows, groups), in fp32."""

    low: Tensor
    high: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest |w| of each group."""
        return torch.maximum(self.high, -self.low)


def group_extents(weight: Tensor, group: int) -> Extents:
    """Return the extents of the groups of `group` columns of a weight (out, in)."""
    ends = []
    for part in row_chunks(weight):
        groups = grouped(part, group)
        ends.append((groups.amin(dim=2).clamp_max_(0), groups.amax(dim=2).clamp_min_(0)))
    low, high = (torch.cat(parts) for parts in zip(*ends, strict=True))
    return Extents(low, high)


def require_half_range(largest: Tensor, name: str) -> None:
    """Raise `BadInputError` that names a tensor whose `largest` values exceed fp16, or are NaN."""
    if not bool((largest <= HALF_MAX).all()):
        raise BadInputError(f"tensor {name!r} holds values above fp16's range, which its scales are stored in")


@dataclass(frozen=True)
class Rescaled:
    """What the rounding of scales alone does to a weight of `name` in the format `fmt`.

    Attributes:
        lost: the relative change of each group of values, in fp64.
        largest: the largest |w| of each group, of the same shape.
        size: values of a group, at most.
    """

    name: str
    fmt: str
    lost: Tensor
    largest: Tensor
    size: int

    def require_small(self, energies: Callable[[], Tensor], most: float = SCALE_ERROR) -> None:
        """Raise `BadInputError` where Σ_g ‖w_g‖² lost_g² is more than `most`² Σ_g ‖w_g‖², w_g being the groups.

        `energies` returns ‖w_g‖², which is asked for only where max |w_g|² ≤ ‖w_g‖² ≤ size · max |w_g|² leaves it open:
        groups that lose up to `most` / 2 lose a quarter of the limit, and the others have three quarters.
        """
        lost, least = self.lost.square(), self.largest.double().square()
        much = torch.where(lost > most**2 / 4, lost * least, 0.0).sum() * self.size
        if bool(much > 0.74 * most**2 * least.sum()):  # a hundredth for the rounding of the sums
            energy = energies()
            require_small_loss(float((energy * lost).sum()), float(energy.sum()), self.name, self.fmt, most)


def require_group_scales(weight: Tensor, extents: Extents, group: int, steps: float, name: str, fmt: str) -> None:
    """Raise `BadInputError` where fp16 scales do not hold the `extents` of the groups of a weight (out, in).

    They do not reach values above fp16's range. Nor may the rounding of scales alone change the weight too much: a
    group's range of `steps` steps takes a scale s = range / steps, stored as ŝ. With groups w_g the change is
    √(Σ_g ‖w_g‖² ((ŝ - s) / s)²  / ‖w‖²), at most `SCALE_ERROR`. Groups of zeros count for nothing.
    """
    require_half_range(extents.largest, name)
    scale = ((extents.high - extents.low) / steps).double()
    lost = torch.where(scale > 0, scale.half().double() / scale - 1, 0.0)
    Rescaled(name, fmt, lost, extents.largest, group).require_small(lambda: _energies(weight, group))


def _energies(weight: Tensor, group: int) -> Tensor:
    """Return the squared norms (out, groups) of the groups of a weight (out, in), in fp64."""
    return over_rows(weight, lambda part: grouped(part, group).double().square_().sum(dim=2))


def require_small_loss(loss: float, energy: float, name: str, fmt: str, most: float = SCALE_ERROR) -> None:
    """Raise `BadInputError` where a squared loss is more than `most`² of the squared norm `energy` of a weight."""
    if loss > most**2 * energy:
        raise BadInputError(
            f"tensor {name!r} holds values so small that {fmt} would change it by {(loss / energy) ** 0.5:.0%} by the "
            "rounding of its scales alone; choose a mix, which leaves it as it is, or nf4, whose scales are fp32"
        )


def grouped(part: Tensor, group: int) -> Tensor:
    """Return rows (n, in) in fp32 as (n, groups, group), the last group padded with zeros, which every grid holds.

    They may be the rows themselves, and otherwise hold until the next call in this thread.
    """
    rows, columns = part.shape
    short = -columns % group
    if not short and part.dtype == torch.float32:
        return part.reshape(rows, -1, group)
    values = scratch("groups", (rows, columns + short), part.device)
    values[:, :columns].copy_(part)
    values[:, columns:] = 0
    return values.view(rows, -1, group)


def inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, and 0 where that is infinite: values divided by 0 have to become code 0."""
    return scale.reciprocal().nan_to_num_(0, 0, 0)


def steps(values: Tensor, inverse_scale: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Return how many steps from 0 the nearest value of a uniform grid lies, between `low` and `high`."""
    return (values * inverse_scale).round_().clamp_(low, high)  # type: ignore[arg-type]


def group_steps(groups: Tensor, inverse_scale: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Return `steps` of groups (rows, groups, group), whose scales and limits are (rows, groups).

    They hold until the next call in this thread. Two comparisons take a quarter of the time of a clamp between limits
    of each group.
    """
    counted = scratch("steps", tuple(groups.shape), groups.device)
    torch.mul(groups, inverse_scale[..., None], out=counted).round_()
    if not isinstance(low, Tensor) or not isinstance(high, Tensor):
        return counted.clamp_(low, high)  # type: ignore[arg-type]
    torch.maximum(counted, low[..., None], out=counted)
    return torch.minimum(counted, high[..., None], out=counted)


def group_errors(groups: Tensor, counted: Tensor, scale: Tensor, importance: Tensor | None) -> Tensor:
    """Return Σ ι (w - c s)² (rows, groups) of the `counted` steps c of groups, of scales s and importances ι."""
    squares = scratch("squares", tuple(groups.shape), groups.device)
    torch.addcmul(groups, counted, scale[..., None], value=-1, out=squares).square_()
    return (squares if importance is None else squares.mul_(importance)).sum(dim=2)
