"""The width of a narrowed expert. Torch-free."""

from __future__ import annotations

import math

from ditmoe_cli.errors import UsageError


def widths_of_ratio(width: int, ratio: float, multiple: int) -> int:
    """Return ⌈ratio · width⌉ neurons, rounded up to a multiple of `multiple` and at most `width`.

    Raises `UsageError` for a ratio outside (0, 1] and a multiple below 1.
    """
    if not 0.0 < ratio <= 1.0:
        raise UsageError(f"ratio of neurons {ratio}: give one above 0 and at most 1.0")
    if multiple < 1:
        raise UsageError(f"multiple of neurons {multiple}: give at least 1")
    wanted = math.ceil(ratio * width - 1e-9)  # 0.28 * 25 is 7.000000000000001 in floating point
    return min(math.ceil(wanted / multiple) * multiple, width)
