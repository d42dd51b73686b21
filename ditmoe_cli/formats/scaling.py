"""Scales in fp16: arithmetic that the formats share whose scales belong to groups of columns or to rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats.packing import row_chunk

HALF_MAX = torch.finfo(torch.float16).max
SCALE_ERROR = 2.0**-8  # by which the rounding of scales alone may change a weight, relative to its norm: bf16's step


def over_rows(weight: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `function` of all rows, computed a few rows at a time."""
    return torch.cat([function(part) for part in row_chunks(weight)])


def row_chunks(weight: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of a weight (out, in), as many together as should be worked on at a time."""
    return torch.split(weight, row_chunk(weight.shape[0], weight.shape[1], weight.device))


def largest_of_rows(weight: Tensor) -> Tensor:
    """Return the largest |w| of each row of a weight (out, in), in fp32."""
    return over_rows(weight, lambda part: part.float().abs().amax(dim=1))


def require_half_range(largest: Tensor, name: str) -> None:
    """Raise `BadInputError` that names a tensor whose `largest` values exceed fp16, or are NaN."""
    if not bool((largest <= HALF_MAX).all()):
        raise BadInputError(f"tensor {name!r} holds values above fp16's range, which its scales are stored in")


def require_group_scales(weight: Tensor, group: int, steps: float, name: str, fmt: str) -> None:
    """Raise `BadInputError` where rounding the scales of groups to fp16 alone changes a weight (out, in) too much.

    A group's range of `steps` steps takes a scale s = range / steps, stored as ŝ. With groups w_g the change is
    √(Σ_g ‖w_g‖² ((ŝ - s) / s)²  / ‖w‖²), at most `SCALE_ERROR`. Groups of zeros count for nothing.
    """
    parts = []
    for part in row_chunks(weight):
        groups = grouped(part.float(), group)
        low, high = groups.amin(dim=2).clamp_max_(0), groups.amax(dim=2).clamp_min_(0)
        scale = ((high - low) / steps).double()
        lost = torch.where(scale > 0, scale.half().double() / scale - 1, 0.0)
        energy = groups.double().square_().sum(dim=2)
        parts.append((float((energy * lost.square()).sum()), float(energy.sum())))
    require_small_loss(sum(loss for loss, _ in parts), sum(energy for _, energy in parts), name, fmt)


def require_small_loss(loss: float, energy: float, name: str, fmt: str, most: float = SCALE_ERROR) -> None:
    """Raise `BadInputError` where a squared loss is more than `most`² of the squared norm `energy` of a weight."""
    if loss > most**2 * energy:
        raise BadInputError(
            f"tensor {name!r} holds values so small that {fmt} would change it by {(loss / energy) ** 0.5:.0%} by the "
            "rounding of its scales alone; choose a mix, which leaves it as it is, or nf4, whose scales are fp32"
        )


def grouped(values: Tensor, group: int) -> Tensor:
    """Return values (rows, n) as (rows, groups, group), the last group padded with zeros, which every grid holds."""
    return F.pad(values, (0, -values.shape[1] % group)).reshape(len(values), -1, group)


def inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, and 0 where it is 0: values divided by it have to become code 0."""
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def steps(values: Tensor, inverse_scale: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Return how many steps from 0 the nearest value of a uniform grid lies, between `low` and `high`."""
    return (values * inverse_scale).round_().clamp_(low, high)  # type: ignore[arg-type]


def scale_groups(values: Tensor, scale: Tensor, zero: Tensor | float | None, group: int) -> None:
    """Replace codes (rows, n) by weights, (code - zero) · scale with one scale and zero a group (rows, groups)."""
    whole = values.shape[1] // group
    pieces = [(values[:, : whole * group].view(-1, whole, group), slice(0, whole))] if whole else []
    if values.shape[1] > whole * group:
        pieces.append((values[:, None, whole * group :], slice(whole, whole + 1)))
    for piece, groups in pieces:
        if zero is not None:
            piece.sub_(zero[:, groups, None] if isinstance(zero, Tensor) else zero)
        piece.mul_(scale[:, groups, None])
