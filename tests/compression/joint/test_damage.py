"""The bound of an error over held-out images, and the search for the smallest size within one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from ditmoe_cli.compression.joint.damage import (
    MOST_SIZES,
    STEP,
    first_place,
    search,
    sizes_between,
    upper_bound,
)
from ditmoe_cli.errors import BadInputError

SIZES = sizes_between(100_000, 1_000_000)


def test_with_equal_references_the_bound_is_that_of_a_mean() -> None:
    """Then R = mean e / r, and its standard error is s / (r √n): the usual bound of a mean by Student's t."""
    errors, reference = np.array([1.0, 3.0, 2.0, 6.0, 2.5]), 4.0
    n = len(errors)
    expected = (errors.mean() + stats.t.ppf(0.95, n - 1) * errors.std(ddof=1) / math.sqrt(n)) / reference
    assert upper_bound(list(errors), [reference] * n) == pytest.approx(expected, rel=1e-12)


def test_two_images_by_hand() -> None:
    """R = 3/4, residuals ±1/4, SE² = 2 · 2/16 / 16 = 1/64, and t(0.95, 1) = tan(0.45 π)."""
    expected = 3 / 4 + math.tan(0.45 * math.pi) / 8
    assert upper_bound([1.0, 2.0], [1.0, 3.0]) == pytest.approx(expected, rel=1e-9)


def test_errors_in_proportion_to_references_leave_nothing_uncertain() -> None:
    assert upper_bound([0.1, 0.2, 0.4], [1.0, 2.0, 4.0]) == pytest.approx(0.1, rel=1e-12)


def test_the_bound_scales_with_errors_and_not_with_both() -> None:
    errors, references = [0.1, 0.3, 0.2], [1.0, 2.0, 1.5]
    bound = upper_bound(errors, references)
    assert upper_bound([7 * e for e in errors], references) == pytest.approx(7 * bound)
    assert upper_bound([7 * e for e in errors], [7 * r for r in references]) == pytest.approx(bound)


@pytest.mark.parametrize(("skewed", "least", "most"), [(False, 0.935, 0.96), (True, 0.905, 0.945)])
@pytest.mark.parametrize("images", [4, 8, 24])
def test_about_95_of_100_bounds_hold(images: int, skewed: bool, least: float, most: float) -> None:
    """Over images whose references differ threefold, and whose errors are 0.02 of them, give or take a third of that.

    Of errors that are skewed to large ones, by a gamma law, some more bounds fail: docs/compress.md.
    """
    generator, ratio, trials = np.random.default_rng(0), 0.02, 4000
    references = generator.uniform(1.0, 3.0, (trials, images))
    spread = generator.gamma(8.0, 1 / 8, references.shape) if skewed else generator.normal(1.0, 0.35, references.shape)
    errors = ratio * references * spread
    held = sum(upper_bound(list(e), list(r)) >= ratio for e, r in zip(errors, references, strict=True))
    assert least < held / trials < most


@pytest.mark.parametrize("count", [0, 1])
def test_a_bound_takes_two_images(count: int) -> None:
    with pytest.raises(BadInputError, match=f"holds out {count} image.*calibration_images 16 or more"):
        upper_bound([1.0] * count, [1.0] * count)


def test_sizes_are_at_most_a_step_apart_from_the_least_to_the_most() -> None:
    assert SIZES[0] == 100_000 and SIZES[-1] == 1_000_000
    assert all(1 < b / a <= STEP * (1 + 1e-4) for a, b in itertools.pairwise(SIZES))
    assert sizes_between(7, 7) == (7,)


def test_the_first_place_that_meets() -> None:
    assert [first_place(lambda at, n=n: at >= n, 0, 9) for n in range(11)] == [*range(10), 9]


def power(exponent: float, factor: float = 1.0) -> Callable[[int], float]:
    """An error that falls with a power of the size: `factor` at the least one."""
    return lambda place: factor * (SIZES[place] / SIZES[0]) ** -exponent


@pytest.mark.parametrize("exponent", [2.0, 3.0, 4.0])
@pytest.mark.parametrize("factor", [0.05, 0.4, 1.5])
def test_the_smallest_size_is_found_where_tried_errors_fall_otherwise_than_predicted(
    exponent: float, factor: float
) -> None:
    damage, allowed = power(exponent, factor), 0.02
    found = search(SIZES, power(3.0), damage, allowed)
    wanted = next((place for place in range(len(SIZES)) if damage(place) <= allowed), None)
    assert wanted is not None and found.met is not None
    assert damage(found.met) <= allowed and SIZES[found.met] <= SIZES[wanted] * 1.03
    assert len(found.damages) <= MOST_SIZES + 2


def test_of_uneven_errors_what_is_found_meets_and_the_next_smaller_tried_one_does_not() -> None:
    uneven = np.random.default_rng(1).normal(0.0, 0.1, len(SIZES))

    def damage(place: int) -> float:
        return power(3.0, 0.3)(place) * math.exp(uneven[place])

    found = search(SIZES, power(3.0), damage, 0.02)
    assert found.met is not None and found.damages[found.met] <= 0.02
    assert all(found.damages[place] > 0.02 for place in found.damages if place < found.met)


def test_where_all_sizes_meet_it_the_least_is_tried_alone() -> None:
    found = search(SIZES, power(3.0), power(3.0, 0.4), 1.0)
    assert found.met == 0 and list(found.damages) == [0]


def test_where_none_meets_it_the_largest_was_tried() -> None:
    found = search(SIZES, power(3.0), lambda place: 1.0 + power(3.0)(place), 0.5)
    assert found.met is None and len(SIZES) - 1 in found.damages


def test_errors_that_stay_almost_as_they_are_end_at_the_largest_size_that_meets() -> None:
    """A tried error far above the predicted one takes larger and larger sizes, until one meets it."""
    found = search(SIZES, power(4.0), power(0.5), power(0.5)(len(SIZES) - 1) * 1.001)
    assert found.met is not None and found.met >= len(SIZES) - 2


def test_errors_of_zero_are_met_and_compared() -> None:
    found = search(SIZES, lambda _: 0.0, lambda _: 0.0, 0.1)
    assert found.met == 0
