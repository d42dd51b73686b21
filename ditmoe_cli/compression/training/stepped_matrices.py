"""Which weights step as matrices (`matrix_steps`), and what that takes. Torch-free.

orth(u) takes 10 m² (2 n + m) operations of a matrix of m rows and n ≥ m columns: 0.14 TFLOP of 1,152 × 4,608 (XL,
1.5 s of one core), 0.25 of 1,408 × 5,632 (G, 2.7 s). All matrices of XL take 111 TFLOP a step, and the gradients of 128
states 252. So few states of wide models step by AdamW alone (`training_memory.pays`).
"""

from __future__ import annotations

from collections.abc import Sequence

from ditmoe_cli.files.names import ROUTER, split_name

ROUNDS = 5
_NARROWEST = 16  # rows and columns
_STACKED = {"attn.qkv.weight": 3, "adaLN_modulation.1.weight": 6}  # matrices that are stored as one


def stacked_matrices(name: str, shape: Sequence[int]) -> int:
    """Return how many matrices a weight of a model is, one on the other; 0 where it is none that steps so.

    Those are the matrices of blocks, without routers, whose rows are as many decisions, and narrow ones.
    """
    parts = split_name(name)
    if parts.block is None or len(shape) != 2 or not name.endswith(".weight") or parts.rest == ROUTER:
        return 0
    count = _STACKED.get(parts.rest, 1)
    return count if min(shape[0] // count, shape[1]) >= _NARROWEST and shape[0] % count == 0 else 0


def matrix_flops(name: str, shape: Sequence[int]) -> int:
    """Return the operations of a step of a weight as matrices; 0 where it is none."""
    count = stacked_matrices(name, shape)
    if not count:
        return 0
    m, n = sorted((shape[0] // count, shape[1]))
    return count * ROUNDS * 2 * m**2 * (2 * n + m)
