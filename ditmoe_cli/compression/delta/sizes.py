"""How large compressed differences are. Torch-free, so that planners can tell sizes without it."""

from __future__ import annotations

import math

from ditmoe_cli.errors import UsageError

TERNARY_PER_BYTE = 5  # 3⁵ = 243 fits a byte


def rank_of_ratio(rows: int, columns: int, ratio: float) -> int:
    """Return the largest rank r with r (m + n) ≤ ratio · m n weights, ⌊ratio · m n / (m + n)⌋; may be 0.

    Raises `UsageError` for a ratio outside (0, 1].
    """
    if not 0.0 < ratio <= 1.0:
        raise UsageError(f"ratio of a difference's weights {ratio}: give one above 0 and at most 1.0")
    return math.floor(ratio * rows * columns / (rows + columns) + 1e-9)


def ternary_bytes(values: int) -> int:
    """Return how many bytes ternary values take, ⌈values / 5⌉."""
    return math.ceil(values / TERNARY_PER_BYTE)
