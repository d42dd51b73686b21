"""Damage: the bound of an error over held-out images, and the smallest file that keeps within one. Torch-free.

The damage of a plan is the upper 95 % bound of its tried error, the relative squared error R = Σ e_i / Σ r_i of the
guided prediction over held-out calibration images i, with e_i = ‖Δ prediction‖² and r_i = ‖prediction‖² over an image's
states. R is a ratio estimator. Its standard error by linearisation is

    SE(R)² = n / (n - 1) · Σ (e_i - R r_i)² / (Σ r_i)²

(W. G. Cochran, Sampling Techniques, 3rd ed., Wiley 1977, section 2.11, without the finite population correction), and
its one-sided bound R + t(0.95, n - 1) SE(R), with Student's t of n - 1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ditmoe_cli.errors import BadInputError

LEVEL = 0.95
FEWEST_HELD = 2  # images, below which nothing tells how far they differ
FIRST_RATIO = 0.4
"""Bound over predicted error, as long as none is measured."""
MOST_SIZES = 6  # that are tried, as long as one of them is small enough in its damage
STEP = 1.01  # of neighbouring sizes
LESS = 0.8  # of the damage that is aimed at, after each size that misses while none has met it


def upper_bound(errors: Sequence[float], references: Sequence[float]) -> float:
    """Return the one-sided upper 95 % bound of Σ e / Σ r over images, as the head of this module has it.

    Args:
        errors: squared errors e_i of n images.
        references: their references r_i.

    0 where there is no reference at all. Raises `BadInputError` for fewer than two images.
    """
    from scipy.special import stdtrit

    count, total = len(errors), math.fsum(references)
    if count < FEWEST_HELD:
        raise BadInputError(too_few(count))
    if not total:
        return 0.0
    ratio = math.fsum(errors) / total
    squares = math.fsum((e - ratio * r) ** 2 for e, r in zip(errors, references, strict=True))
    deviation = math.sqrt(count / (count - 1) * squares) / total
    return ratio + float(stdtrit(count - 1, LEVEL)) * deviation


def too_few(count: int) -> str:
    """Return the message about a profile with too few held-out images for a bound."""
    return (
        f"the profile holds out {count} image{'s' * (count != 1)}, and a bound of ⟨max_damage⟩ takes {FEWEST_HELD} or "
        "more; profile with ⟨calibration_images⟩ 16 or more"
    )


def sizes_between(least: int, most: int) -> tuple[int, ...]:
    """Return sizes from `least` to `most` bytes, ascending, neighbours at most a factor of `STEP` apart."""
    count = math.ceil(math.log(most / least) / math.log(STEP)) if most > least else 0
    return tuple(sorted({round(least * (most / least) ** (i / count)) for i in range(count)} | {most}))


@dataclass(frozen=True)
class Searched:
    """Sizes that were tried, and the damage of each.

    Attributes:
        damages: by the place of a size among all.
        met: the place of the smallest one that keeps within what is allowed; None where none does.
    """

    damages: Mapping[int, float]
    met: int | None


def search(
    sizes: Sequence[int],
    predicted: Callable[[int], float],
    damage: Callable[[int], float],
    allowed: float,
) -> Searched:
    """Find the smallest size whose damage is at most `allowed`, trying few.

    A size is expected to have its predicted error times the ratio of damage and predicted error that was measured: on
    logarithmic scales interpolated between the sizes that were tried, and beyond them that of the nearest. Each next
    try is the smallest size expected to keep within `allowed`, between the largest that misses and the smallest that
    does not. Ends at neighbouring sizes, or behind `MOST_SIZES` tries as soon as one has met it: the largest size is
    tried before none is found.

    Args:
        sizes: sizes to choose from, ascending.
        predicted: returns the predicted error at a place among them, which falls with the size.
        damage: carries the plan of a place out; returns its damage.
        allowed: the largest damage allowed.
    """
    damages: dict[int, float] = {}
    low, high = -1, len(sizes)  # the largest that misses, the smallest that meets
    while high - low > 1 and (high == len(sizes) or len(damages) < MOST_SIZES):
        aim = allowed if high < len(sizes) else allowed * LESS ** len(damages)
        ratios = {place: damages[place] / max(predicted(place), 1e-300) for place in damages}
        meets = partial(_meets, sizes, ratios, predicted, aim)
        place = first_place(meets, low + 1, min(high, len(sizes)) - 1)
        damages[place] = damage(place)
        if damages[place] <= allowed:
            high = place
        else:
            low = place
    return Searched(damages, high if high < len(sizes) else None)


def first_place(meets: Callable[[int], bool], low: int, high: int) -> int:
    """Return the first of the places `low` to `high` that meets something which larger ones meet too; else `high`."""
    while low < high:
        middle = (low + high) // 2
        if meets(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _meets(
    sizes: Sequence[int], ratios: Mapping[int, float], predicted: Callable[[int], float], aim: float, place: int
) -> bool:
    """Return whether the damage that is expected at a place is at most `aim`."""
    return predicted(place) * _ratio(sizes, ratios, place) <= aim


def _ratio(sizes: Sequence[int], found: Mapping[int, float], place: int) -> float:
    """Return a ratio between measured ones, by place: interpolated, constant beyond; `FIRST_RATIO` if there is none."""
    if not found:
        return FIRST_RATIO
    below = max((known for known in found if known <= place), default=min(found))
    above = min((known for known in found if known >= place), default=max(found))
    if below >= above or min(found[below], found[above]) <= 0:
        return found[below]
    share = math.log(sizes[place] / sizes[below]) / math.log(sizes[above] / sizes[below])
    return math.exp((1 - share) * math.log(found[below]) + share * math.log(found[above]))
