"""How checkpoints are related by their histories, and which experts they kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.files.provenance import Step, expert_fates
from ditmoe_cli.model.lineage import Kinship, Lineage, kept_experts, kinship


def steps(*sources: str) -> tuple[Step, ...]:
    return tuple(Step("x", source, "") for source in sources)


ORIGINAL = Lineage("o")
PRUNED = Lineage("p", steps("o"))
PACKED = Lineage("q", steps("o", "p"))
MERGED = Lineage("m", steps("o"))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (ORIGINAL, ORIGINAL, Kinship("same")),
        (PACKED, PACKED, Kinship("same", shared=steps("o", "p"))),
        (ORIGINAL, PACKED, Kinship("ancestor", b=steps("o", "p"))),
        (PRUNED, PACKED, Kinship("ancestor", shared=steps("o"), b=steps("p"))),
        (PACKED, PRUNED, Kinship("descendant", shared=steps("o"), a=steps("p"))),
        (PACKED, MERGED, Kinship("siblings", a=steps("o", "p"), b=steps("o"))),
        (Lineage("r", steps("o", "p")), PACKED, Kinship("siblings", shared=steps("o"), a=steps("p"), b=steps("p"))),
        (Lineage("z"), PACKED, Kinship("unknown", b=steps("o", "p"))),
        (Lineage(None), Lineage(None), Kinship("unknown")),
        (Lineage(None, steps("o")), PRUNED, Kinship("siblings", a=steps("o"), b=steps("o"))),
    ],
)
def test_kinship(a: Lineage, b: Lineage, expected: Kinship) -> None:
    assert kinship(a, b) == expected


FLIPPED = {"ancestor": "descendant", "descendant": "ancestor"}


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4), st.lists(st.sampled_from("abcdef"), min_size=1))
def test_kinship_is_the_same_from_either_side(a: list[str], b: list[str]) -> None:
    left, right = Lineage(a[-1], steps(*a[:-1])), Lineage(b[-1], steps(*b[:-1]))
    one, other = kinship(left, right), kinship(right, left)
    if len(set(a)) == len(a) and len(set(b)) == len(b):  # a history that visits no checkpoint twice
        assert other.relation == FLIPPED.get(one.relation, one.relation)
        assert (other.a, other.b) == (one.b, one.a)


def dropping(*blocks: str) -> Step:
    return Step("prune", "o", "", experts=blocks)


def test_kept_experts_are_those_of_the_first_checkpoint() -> None:
    first, second = dropping("0-2--5", "-1-345"), dropping("-12", "0--3")
    assert kept_experts([first], (3, 4)) == ((0, 2, 5), (1, 3, 4, 5))
    assert kept_experts([first, Step("quantize", "p", ""), second], (2, 2)) == ((2, 5), (1, 5))
    assert kept_experts([Step("quantize", "p", "")], (3, 4)) is None
    assert kept_experts([], (3, 4)) is None


def test_a_merged_expert_is_the_one_that_took_it_in() -> None:
    assert kept_experts([dropping("0022")], (2,)) == ((0, 2),)


def test_what_does_not_fit_is_not_known() -> None:
    assert kept_experts([dropping("0-2")], (3,)) is None, "two are left"
    assert kept_experts([dropping("0-2"), dropping("012")], (3,)) is None, "of two experts three cannot be left"
    assert kept_experts([dropping("0" * 11)], (1,)) is None, "no number of experts takes eleven characters"
    assert kept_experts([dropping("0-2"), dropping("0-", "0-")], (1,)) is None, "another number of blocks"


@given(st.integers(1, 200))
def test_fates_are_read_whatever_the_number_of_experts(count: int) -> None:
    width = len(str(count - 1))
    fates = [str(expert) if expert % 3 else "-" for expert in range(count)]
    assert expert_fates("".join(fate.rjust(width) for fate in fates)) == fates


def test_fates_of_no_number_of_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="no number of experts"):
        expert_fates("0" * 11)
