"""Which experts become one: groups cover all experts once, and are those that were planted."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import HIDDEN, WIDTH, groups_of, planted
from swiglu import random_expert

from ditmoe_cli.compression.merge import grouping
from ditmoe_cli.compression.merge.inputs import Groups
from ditmoe_cli.compression.methods import MERGES
from ditmoe_cli.errors import BadInputError, InfeasibleError

CLUSTERING = sorted(set(MERGES) - {"average"})
EXPERTS = 7

every_method = pytest.mark.parametrize("method", MERGES)


def assert_groups(groups: Groups, experts: int, count: int) -> None:
    assert len(groups) == count
    assert sorted(expert for group in groups for expert in group) == list(range(experts))
    assert all(group == tuple(sorted(group)) for group in groups)
    assert groups == tuple(sorted(groups))


@every_method
@pytest.mark.parametrize("count", range(1, EXPERTS + 1))
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(planted(range(EXPERTS)), id="unlike"),
        pytest.param(planted([0, 0, 0, 1, 1, 2, 2]), id="clustered"),
        pytest.param(planted([0] * EXPERTS, noise=0.0), id="equal"),
        pytest.param(planted([0, 1, 2, 0, 1, 2, 0], selected=[0.0] * EXPERTS), id="never selected"),
        pytest.param(planted([0, 1] * 3 + [0], selected=[5, 0, 0, 0, 0, 0, 0]), id="one selected"),
    ],
)
def test_groups_cover_all_experts_once(method: str, count: int, block: grouping.GroupingInputs) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = MERGES[method].group(block, count)
    assert_groups(groups, EXPERTS, count)
    assert MERGES[method].group(block, count) == groups


@every_method
def test_as_many_groups_as_experts_are_single_and_one_group_holds_all(method: str) -> None:
    block = planted([0, 0, 1, 2])
    assert MERGES[method].group(block, 4) == ((0,), (1,), (2,), (3,))
    assert MERGES[method].group(block, 1) == ((0, 1, 2, 3),)


@every_method
@pytest.mark.parametrize("count", [0, -1, 5])
def test_impossible_counts_are_refused(method: str, count: int) -> None:
    with pytest.raises(InfeasibleError, match="4 experts cannot be merged into"):
        MERGES[method].group(planted([0, 0, 1, 2]), count)


@pytest.mark.parametrize("method", CLUSTERING)
@settings(max_examples=15, deadline=None)
@given(labels=st.lists(st.integers(0, 2), min_size=3, max_size=9).filter(lambda labels: len(set(labels)) > 1))
def test_planted_groups_are_found(method: str, labels: list[int]) -> None:
    expected = groups_of(labels)
    assert MERGES[method].group(planted(labels), len(expected)) == expected


@pytest.mark.parametrize("method", ["m-smoe", "uncurl"])
def test_router_similarity_is_taken_cell_by_cell(method: str) -> None:
    """One cell with large logits pairs 0 with 2 and 1 with 3; two with small ones pair 0 with 1 and 2 with 3."""
    loud, quiet = ([[1.0 if a % 2 == b % 2 else 0.0 for b in range(4)] for a in range(4)],
                   [[1.0 if a // 2 == b // 2 else 0.0 for b in range(4)] for a in range(4)])  # fmt: skip
    grams = np.array([np.array(loud) * 1e6, quiet, quiet, np.zeros((4, 4))])
    block = replace(planted([0, 1, 2, 3], selected=[4, 1, 3, 1]), logit_grams=grams)
    assert MERGES[method].group(block, 2) == ((0, 1), (2, 3))


def test_router_similarity_by_hand() -> None:
    """Cosines of 1, -1/2, 0 and 1/2 in four cells: 1/4 on average."""
    grams = [[[4.0, 2.0], [2.0, 1.0]], [[1.0, -1.5], [-1.5, 9.0]], [[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 4.0]]]
    expected = pytest.approx(np.array([[1.0, 0.625], [0.625, 1.0]]))
    assert grouping.router_similarity(np.array(grams)) == expected
    assert grouping.router_similarity(np.concatenate((grams, np.zeros((5, 2, 2))))) == expected, "empty cells"
    assert (grouping.router_similarity(np.zeros((2, 3, 3))) == 0.5).all()


def test_centres_stay_their_own_though_others_are_as_close() -> None:
    closeness = np.ones((4, 2))
    closeness[3] = [0.0, 1.0]
    assert grouping.nearest_centres([2, 0], closeness) == [1, 0, 0, 1]


@pytest.mark.parametrize("method", ["m-smoe", "mergemoe"])
def test_the_experts_selected_most_are_in_different_groups(method: str) -> None:
    groups = MERGES[method].group(planted([0, 0, 1, 1, 1], selected=[9, 8, 1, 2, 7]), 3)
    assert [sum(dominant in group for dominant in (0, 1, 4)) for group in groups] == [1, 1, 1]


def test_cells_count_by_size_for_hc_smoe_and_alike_for_sub_moe() -> None:
    """The large outputs of one cell say (0 2) (1 3), the small ones of two others (0 1) (2 3)."""
    axes = 10.0 * np.eye(8)
    loud, quiet = axes[[0, 1, 0, 1]], axes[[2, 2, 3, 3]] / 100
    block = replace(planted([0, 1, 2, 3]), means=np.array([loud, quiet, quiet]))
    assert MERGES["hc-smoe"].group(block, 2) == ((0, 2), (1, 3))
    assert MERGES["sub-moe"].group(block, 2) == ((0, 1), (2, 3))


def test_hc_smoe_links_by_the_average() -> None:
    """Single linkage would chain all but the last, complete linkage part the second from the third."""
    means = np.array([[[0.0], [2.0], [5.0], [9.2], [13.5]]])
    block = replace(planted(range(5)), means=means)
    assert MERGES["hc-smoe"].group(block, 2) == ((0, 1, 2), (3, 4))


@pytest.mark.parametrize("matrix", ["gate", "up"])
def test_mergemoe_measures_both_gate_and_up(matrix: str) -> None:
    """Experts 0 and 1 are centres; 2 and 3 differ from them in one matrix alone."""
    experts = [random_expert(HIDDEN, WIDTH, 0)] * 4
    for e, value in enumerate((0.0, 4.0, 3.0, 1.0)):
        experts[e] = replace(experts[e], **{matrix: torch.full((WIDTH, HIDDEN), value)})
    block = replace(planted(range(4)), experts=lambda: experts)
    assert MERGES["mergemoe"].group(block, 2) == ((0, 3), (1, 2))


def test_opposite_logits_are_not_alike_to_uncurl() -> None:
    cosines = np.array([[1.0, -1.0, 0.1], [-1.0, 1.0, -0.1], [0.1, -0.1, 1.0]])
    block = replace(planted(range(3)), logit_grams=cosines[None])
    assert MERGES["uncurl"].group(block, 2) == ((0, 2), (1,))


def test_average_spreads_experts_that_are_never_selected() -> None:
    groups = MERGES["average"].group(planted([0] * 7, selected=[0.0] * 7), 3)
    assert sorted(map(len, groups)) == [2, 2, 3]


@given(selected=st.lists(st.integers(0, 1000), min_size=2, max_size=12), count=st.integers(1, 12))
def test_average_balances_how_often_groups_are_selected(selected: list[int], count: int) -> None:
    if count > len(selected):
        return
    groups = MERGES["average"].group(planted([0] * len(selected), selected=selected), count)
    assert_groups(groups, len(selected), count)
    totals = [sum(selected[expert] for expert in group) for group in groups]
    heaviest = groups[totals.index(max(totals))]
    # what went in last found the group lightest
    assert max(totals) - min(selected[expert] for expert in heaviest) <= min(totals)


@every_method
def test_mean_outputs_are_needed_by_those_that_say_so(method: str) -> None:
    block = replace(planted([0, 0, 1, 2]), means=None)
    if MERGES[method].needs_means:
        with pytest.raises(BadInputError, match="profile without fast"):
            MERGES[method].group(block, 2)
    else:
        assert_groups(MERGES[method].group(block, 2), 4, 2)


def test_only_weight_distances_read_experts() -> None:
    def refuse() -> list[grouping.GroupingInputs]:
        raise AssertionError("experts are expensive to read")

    block = replace(planted([0, 0, 1, 2]), experts=refuse)
    for method in set(MERGES) - {"mergemoe"}:
        MERGES[method].group(block, 2)
    MERGES["mergemoe"].group(block, 4)
