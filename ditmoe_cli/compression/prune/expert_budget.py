"""One budget of experts, spread over the blocks so that the sum of measured errors is least. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ditmoe_cli.errors import InfeasibleError

# Σ error, Σ n², experts kept by each block so far: in the order in which they are compared
_Spread = tuple[float, int, tuple[int, ...]]


def allocate(errors: Sequence[Sequence[float]], budget: int, least: int) -> tuple[int, ...]:
    """Return how many experts n_b each block keeps: the exact minimum of Σ_b errors[b][n_b - 1] with Σ n_b = `budget`.

    errors[b][n - 1] is the error of block b when it keeps n experts; its length is the number that the block has. Every
    block keeps at least `least` >= 1. Of equal sums the most even wins (least Σ n_b²), then the lexicographically
    first. By dynamic programming over blocks: L blocks of E experts take L E `budget` steps. Raises `InfeasibleError`
    where no spread has the sum.
    """
    choices = [range(least, len(block) + 1) for block in errors]
    most = sum(len(block) for block in errors)
    if not all(choices) or not least * len(choices) <= budget <= most:
        raise InfeasibleError(
            f"{budget} experts cannot be spread over {len(errors)} blocks that keep {least} or more each, {most} in all"
        )
    reached: dict[int, _Spread] = {0: (0.0, 0, ())}
    for block, counts in zip(errors, choices, strict=True):
        reached = _extended(reached, block, [n for n in counts if n <= budget])
    return reached[budget][2]


def _extended(reached: dict[int, _Spread], errors: Sequence[float], counts: Iterable[int]) -> dict[int, _Spread]:
    """Return the best spread of each sum with one more block, which keeps one of `counts`."""
    best: dict[int, _Spread] = {}
    for total, (error, squares, kept) in reached.items():
        for n in counts:
            spread = (error + errors[n - 1], squares + n * n, (*kept, n))
            best[total + n] = min(best.get(total + n, spread), spread)
    return best
