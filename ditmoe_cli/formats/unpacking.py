"""Unpacking into a given tensor, a few rows at a time, and the scales and zero points of groups of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ditmoe_cli.formats.packing import row_chunk
from ditmoe_cli.formats.scratch import scratch

Compute = Callable[[Tensor, slice], object]  # write the rows of a slice, in fp32
_CELL_BYTES = 16  # which look-ups in tables may move at once


def fill_rows(out: Tensor, compute: Compute, multiple: int = 1) -> None:
    """Fill `out` (rows, columns), of any floating dtype, by ``compute(values, rows)``, which writes some rows in fp32.

    Values are rounded as ``to(out.dtype)`` rounds them. So many rows are computed at a time that they stay in the cache
    of a core, and fp32 values are written in place: there is no second matrix, and no memory that is fresh. All slices
    but the last are of a `multiple` of rows.
    """
    rows, columns = out.shape
    step = 2 * row_chunk(rows, columns, out.device)  # half of the arithmetic is in smaller words
    step += -step % multiple
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        target = out[part]
        in_place = target.dtype == torch.float32 and target.is_contiguous() and not target.data_ptr() % _CELL_BYTES
        values = target if in_place else scratch("unpacked", tuple(target.shape), out.device)
        compute(values, part)
        if not in_place:
            target.copy_(values)


def subtract_zeros(codes: Tensor, zero: Tensor | int, group: int) -> None:
    """Subtract in place from codes (rows, n) one zero point, or that (rows, groups) of each group of columns."""
    if not isinstance(zero, Tensor):
        codes.sub_(zero)
        return
    for part, groups in _groups(codes, group):
        part.sub_(zero[:, groups, None])


def multiply_groups(values: Tensor, scale: Tensor, group: int, out: Tensor) -> None:
    """Write values (rows, n) times the scale (rows, groups) of their group of columns to `out`."""
    for (part, groups), (target, _) in zip(_groups(values, group), _groups(out, group), strict=True):
        torch.mul(part, scale[:, groups, None], out=target)


def _groups(values: Tensor, group: int) -> Iterator[tuple[Tensor, slice]]:
    """Yield the whole groups (rows, groups, group) of values (rows, n), and the short last one, with their numbers."""
    whole = values.shape[1] // group
    if whole:
        yield values[:, : whole * group].view(-1, whole, group), slice(0, whole)
    if values.shape[1] > whole * group:
        yield values[:, None, whole * group :], slice(whole, whole + 1)
