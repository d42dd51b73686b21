"""Mutual information of expert and position, step, class, branch: closed forms, and routers planted to depend on one.

A planted router chooses, with probability 1 - NOISE, the expert(s) that the variable points to, else experts at
random; then the information is known in closed form. Every value of a variable is as frequent as any other, and
points to every expert equally often.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.routing.report.information import (
    class_information,
    information_with_interval,
    normalised_mutual_information,
)

IMAGES, STEPS, POSITIONS, CLASSES, EXPERTS = 32, 4, 16, 4, 4
ROUTERS = ("position", "step", "class", "nothing")
NOISE = 0.6
REPETITIONS = 100
some_tables = arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.integers(0, 40))


# the numbers themselves


def entropy_of_experts(table):
    """Return H(E) in nats of counts (X, E)."""
    share = table.sum(axis=0) / max(table.sum(), 1)
    return -(share[share > 0] * np.log(share[share > 0])).sum()


def test_closed_forms():
    assert normalised_mutual_information(np.eye(4) * 3) == pytest.approx(1.0)
    assert normalised_mutual_information(np.outer([1, 2, 3], [5, 1, 7, 2])) == pytest.approx(0.0, abs=1e-14)
    # a symmetric channel with error 1/10: ln 2 - H(1/10)
    error = 0.1 * math.log(10) + 0.9 * math.log(10 / 9)
    assert normalised_mutual_information([[9, 1], [1, 9]]) == pytest.approx(1 - error / math.log(2))
    # two branches of four experts, each its own two: half of the entropy
    assert normalised_mutual_information([[1, 1, 0, 0], [0, 0, 1, 1]]) == pytest.approx(0.5)


@pytest.mark.parametrize("table", [np.zeros((3, 4)), np.full((3, 1), 7), np.eye(4)[:, :1], np.full((1, 4), 7)])
def test_nothing_to_tell(table):
    assert normalised_mutual_information(table) == 0.0


@given(some_tables)
def test_information_is_symmetric_bounded_and_scale_free(table):
    value = float(normalised_mutual_information(table))
    nats = value * entropy_of_experts(table)
    assert nats == pytest.approx(float(normalised_mutual_information(table.T)) * entropy_of_experts(table.T), abs=1e-10)
    assert value == pytest.approx(float(normalised_mutual_information(5 * table[::-1])), abs=1e-10)
    assert 0 <= nats <= math.log(min(table.shape)) + 1e-10
    assert 0 <= value <= 1


@given(some_tables.filter(np.any))
def test_information_against_its_definition(table):
    p = table / table.sum()
    independent = p.sum(axis=1, keepdims=True) * p.sum(axis=0)
    known = p > 0
    expected = (p[known] * np.log(p[known] / independent[known])).sum()
    share = expected / entropy_of_experts(table) if np.count_nonzero(table.sum(axis=0)) > 1 else 0.0
    assert normalised_mutual_information(table) == pytest.approx(share, abs=1e-10)


def test_leading_axes_stay():
    tables = np.random.default_rng(0).integers(0, 9, (2, 3, 5, 4))
    found = normalised_mutual_information(tables)
    assert found.shape == (2, 3) and found[1, 2] == normalised_mutual_information(tables[1, 2])


# planted routers


def routed(variable, top_k, seed, shared=0.0, images=IMAGES):
    """Return counts (I, S, P, E) and labels (I,) of a router that depends on `variable` alone.

    A token that chooses at random follows its image's own random choice with probability `shared`, so that the
    tokens of an image go together, for no reason that images have in common.
    """
    # no two routers share their randomness, so that their failures do not go together
    generator = np.random.default_rng([seed, top_k, ROUTERS.index(variable), int(100 * shared), images])
    tokens = (images, STEPS, POSITIONS)
    image, step, position = np.indices(tokens)
    own = np.argsort(generator.random((*tokens, EXPERTS)), axis=-1)[..., :top_k]
    of_image = np.argsort(generator.random((images, 1, 1, EXPERTS)), axis=-1)[..., :top_k]
    chosen = np.where(generator.random((*tokens, 1)) < shared, of_image, own)
    if variable != "nothing":
        points_to = {"position": position, "step": step, "class": image % CLASSES}[variable]
        planted = (points_to[..., None] + np.arange(top_k)) % EXPERTS
        chosen = np.where(generator.random((*tokens, 1)) < 1 - NOISE, planted, chosen)
    return np.eye(EXPERTS)[chosen].sum(axis=-2), np.arange(images) % CLASSES


def population(top_k):
    """Return I / H(E) of the planted variable: 1 - H(row) / ln E."""
    row = np.full(EXPERTS, NOISE / EXPERTS)
    row[:top_k] += (1 - NOISE) / top_k
    return 1 + (row * np.log(row)).sum() / math.log(EXPERTS)


def estimate_of(counts, labels, variable, seed):
    if variable == "class":
        return class_information(counts.sum(axis=(1, 2)), labels, seed=seed)
    return information_with_interval(counts.sum(axis=1 if variable == "position" else 2), seed=seed)


@cache
def repeated(planted, top_k, shared, images=IMAGES):
    """Return, by variable, the estimates of REPETITIONS runs."""
    runs = [routed(planted, top_k, seed, shared, images) for seed in range(REPETITIONS)]
    return {
        variable: [estimate_of(*run, variable, seed) for seed, run in enumerate(runs)]
        for variable in ("position", "step", "class")
    }


@pytest.mark.parametrize(
    ("planted", "top_k", "shared"),
    [
        *((planted, 1, 0.5) for planted in ROUTERS),
        *(pytest.param(planted, k, 0.0, marks=pytest.mark.slow) for planted in ROUTERS for k in (1, 2)),
    ],
)
def test_the_planted_variable_lies_in_its_interval_and_no_other_stands_out(planted, top_k, shared):
    for variable, estimates in repeated(planted, top_k, shared).items():
        if variable == planted:
            truth = population(top_k)
            covered = np.mean([e.low <= truth <= e.high for e in estimates])
            assert covered >= 0.85, variable
            assert all(e.value > e.null_high and e.low > 0 for e in estimates), "all find it"
            assert np.mean([e.corrected for e in estimates]) == pytest.approx(truth, rel=0.05)
        else:
            # 95 % are meant to; with 100 runs the standard error is 2 %
            assert np.mean([e.value <= e.null_high for e in estimates]) >= 0.87, variable
            assert np.mean([e.low == 0.0 for e in estimates]) >= 0.9, variable
            assert abs(np.mean([e.excess for e in estimates])) < 0.002, variable


@pytest.mark.parametrize(
    "settings", [((1, 0.5),), pytest.param(((1, 0.0), (2, 0.0), (1, 0.5)), marks=pytest.mark.slow)]
)
def test_unplanted_variables_lie_below_the_null_in_nine_of_ten_runs(settings):
    below = [
        e.value <= e.null_high
        for planted in ROUTERS
        for top_k, shared in settings
        for variable, estimates in repeated(planted, top_k, shared).items()
        if variable != planted
        for e in estimates
    ]
    # 95 % are meant to; 900 or 2700 runs, so that three standard errors are 2.2 or 1.3 %
    assert np.mean(below) == pytest.approx(0.95, abs=0.02)


@pytest.mark.slow
def test_why_not_the_percentiles_and_not_the_basic_interval():
    """Plain percentiles miss; with few images it shows. The basic interval covers slightly less than the one in use.

    With b the bias, plain percentiles lie 2 b higher, and the basic interval is the mirror image about `corrected`.
    """
    truth, found = population(1), {"in use": [], "percentile": [], "basic": []}
    for variable in ("position", "step"):
        for shared in (0.0, 0.5):
            for e in repeated(variable, 1, shared, images=8)[variable]:
                bias = e.value - e.corrected
                found["in use"].append(e.low <= truth <= e.high)
                found["percentile"].append(e.low + 2 * bias <= truth <= e.high + 2 * bias)
                found["basic"].append(2 * e.corrected - e.high <= truth <= 2 * e.corrected - e.low)
    share = {name: np.mean(covered) for name, covered in found.items()}
    assert share["in use"] >= 0.9
    assert share["percentile"] < 0.7
    # over 600 runs 1 % less; two images per class are the exception, where all three cover too little
    assert share["basic"] <= share["in use"] + 0.02


def test_branches_that_route_differently():
    """Two branches of 4 experts: half of the choices fall on the branch's own two, ln 2 / ln 4 of them at most."""
    row = np.array([0.375, 0.375, 0.125, 0.125])
    truth = 1 + (row * np.log(row)).sum() / math.log(4)
    covered, found, quiet = [], [], []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        differing = np.stack([generator.multinomial(64, row, IMAGES), generator.multinomial(64, row[::-1], IMAGES)], 1)
        alike = generator.multinomial(64, row, (IMAGES, 2))
        estimate, other = (information_with_interval(t, seed=seed) for t in (differing, alike))
        covered.append(estimate.low <= truth <= estimate.high)
        found.append(estimate.value > estimate.null_high)
        quiet.append(other.value <= other.null_high)
        assert estimate.high <= 0.5, "two branches cannot tell more"
    assert np.mean(covered) >= 0.85 and all(found) and np.mean(quiet) >= 0.9


def blobs(seed):
    """Counts (I, P, E) of images made of 4 by 4 squares of one expert each, at random places on an 8 by 8 grid."""
    generator = np.random.default_rng(seed)
    tables = np.zeros((IMAGES, 64, EXPERTS))
    for table in tables:
        top, left = generator.integers(4, size=2)
        squares = np.kron(generator.integers(EXPERTS, size=(3, 3)), np.ones((4, 4), dtype=int))
        table[np.arange(64), squares[top : top + 8, left : left + 8].ravel()] = STEPS
    return tables


def test_shifts_keep_what_neighbours_have_in_common():
    below = {"permute-within-image": [], "shift-within-image": []}
    for seed in range(40):
        for null, found in below.items():
            estimate = information_with_interval(blobs(seed), seed=seed, null=null)
            found.append(estimate.value <= estimate.null_high)
    share = {null: np.mean(found) for null, found in below.items()}
    assert share["shift-within-image"] >= 0.9
    assert share["permute-within-image"] < share["shift-within-image"], "takes blobs for a map at times"


# the machinery


def test_seeds_decide():
    counts, labels = routed("position", 1, 0)
    for estimate in (
        lambda seed: information_with_interval(counts.sum(axis=1), seed=seed),
        lambda seed: class_information(counts.sum(axis=(1, 2)), labels, seed=seed),
    ):
        first, again, other = estimate(3), estimate(3), estimate(4)
        assert first == again
        assert first.value == other.value and (first.low, first.null_mean) != (other.low, other.null_mean)


def test_the_value_is_that_of_the_pooled_table():
    counts, labels = routed("class", 2, 0)
    tables = counts.sum(axis=2)
    estimate = information_with_interval(tables)
    assert estimate.value == normalised_mutual_information(tables.sum(axis=0))
    assert estimate.excess == estimate.value - estimate.null_mean
    by_class = np.stack([counts[labels == c].sum(axis=(0, 1, 2)) for c in range(CLASSES)])
    estimate = class_information(counts.sum(axis=(1, 2)), labels)
    assert estimate.value == pytest.approx(float(normalised_mutual_information(by_class)))
    assert estimate.low <= estimate.corrected <= estimate.high


def test_names_of_classes_are_of_no_matter():
    counts, labels = routed("class", 1, 0)
    per_image = counts.sum(axis=(1, 2))
    assert class_information(per_image, labels) == class_information(per_image, 100 + 7 * labels)


def test_a_higher_confidence_is_a_wider_interval():
    tables = routed("position", 1, 0)[0].sum(axis=1)
    narrow, wide = (information_with_interval(tables, confidence=c) for c in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high
    assert wide.null_high > narrow.null_high


def test_an_image_alone_tells_no_interval():
    estimate = information_with_interval(np.eye(4)[None] * 9)
    assert (estimate.value, estimate.low, estimate.high) == (pytest.approx(1.0), 0.0, pytest.approx(1.0))
    assert estimate.null_mean == pytest.approx(estimate.value), "a permutation of one image tells as much"
    estimate = information_with_interval(np.ones((1, 2, 16)))
    assert (estimate.value, estimate.low) == (0.0, 0.0)
    assert estimate.high == pytest.approx(0.25), "two branches tell at most ln 2 of ln 16"


def test_an_image_per_class_tells_nothing_of_classes():
    estimate = class_information(np.eye(4) * 9, [0, 1, 2, 3])
    assert (estimate.value, estimate.low, estimate.high) == (pytest.approx(1.0), 0.0, pytest.approx(1.0))
    assert estimate.excess == pytest.approx(0.0), "it is what any labels give"
    assert class_information(np.eye(4)[:1], [5]).value == 0.0


def test_a_class_of_a_single_image_among_others():
    counts, labels = routed("class", 1, 0)
    labels = np.where(np.arange(IMAGES) == 3, 9, labels)
    estimate = class_information(counts.sum(axis=(1, 2)), labels)
    assert 0 < estimate.low < population(1) < estimate.high


@pytest.mark.parametrize("tables", [np.zeros((3, 4, 5)), np.full((3, 4, 1), 2), np.full((3, 1, 4), 2)])
def test_no_counts_one_expert_or_one_value(tables):
    estimate = information_with_interval(tables)
    assert (estimate.value, estimate.low, estimate.high, estimate.null_high, estimate.excess) == (0.0,) * 5
    estimate = class_information(tables[:, 0], [0, 0, 0])
    assert (estimate.value, estimate.low, estimate.high, estimate.null_high, estimate.excess) == (0.0,) * 5


def test_two_images_of_which_one_is_empty():
    estimate = information_with_interval(np.stack([np.eye(3) * 5, np.zeros((3, 3))]))
    assert 0.0 == estimate.low <= estimate.corrected <= estimate.high <= 1.0


def test_what_is_refused():
    tables = np.ones((3, 4, 5))
    for bad, message in (
        (np.ones((4, 5)), r"must be \(I, X, E\)"),
        (np.ones((2, 3, 4, 5)), r"must be \(I, X, E\)"),
        (np.ones((0, 4, 5)), r"must be \(I, X, E\)"),
        (-tables, "not negative"),
        (tables * math.nan, "finite"),
    ):
        with pytest.raises(BadInputError, match=message):
            information_with_interval(bad)
    for settings in ({"replicates": 1}, {"seed": -1}, {"confidence": 1.0}, {"confidence": 0.0}):
        with pytest.raises(BadInputError, match="an interval needs"):
            information_with_interval(tables, **settings)
        with pytest.raises(BadInputError, match="an interval needs"):
            class_information(tables[0], [0, 0, 1, 1], **settings)
    with pytest.raises(BadInputError, match="no null called 'other'"):
        information_with_interval(tables, null="other")
    for labels in ([0, 1], np.zeros((4, 1))):
        with pytest.raises(BadInputError, match="one label per image"):
            class_information(tables[0], labels)
    with pytest.raises(BadInputError, match=r"\(\.\.\., X, E\)"):
        normalised_mutual_information([1, 2])
