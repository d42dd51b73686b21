"""How many words and bytes small integers take once they are packed; `packing` packs them."""

from __future__ import annotations

import math

WORD_BITS = 32
FEWEST_TELLING = 32  # values of a row whose number of words tells their width
TERNARY_PER_BYTE = 5  # 3⁵ = 243 fits a byte


def packed_words(values: int, bits: int) -> int:
    """Return how many 32-bit words a row of values takes, ⌈values · bits / 32⌉."""
    return math.ceil(values * bits / WORD_BITS)


def ternary_bytes(values: int) -> int:
    """Return how many bytes ternary values take, ⌈values / 5⌉."""
    return math.ceil(values / TERNARY_PER_BYTE)
