"""Scales in fp16: arithmetic that the formats share whose scales belong to groups of columns or to rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats.packing import row_chunk

HALF_MAX = torch.finfo(torch.float16).max


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
