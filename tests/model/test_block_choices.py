"""What blocks compute, as texts and as tables: read as they are written, refused where they cannot be carried out."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.model.block_choices import (
    FOLLOW,
    FULL,
    BlockChoice,
    ComputeTable,
    NullChoice,
    SlotRule,
    full_table,
    parse_choice,
    table_of,
)

PARTS = ("compute", "reuse", "forecast", "skip")  # of a block that does something; in `FOLLOW` it does not
RULES = st.one_of(
    st.sampled_from([SlotRule("top1"), SlotRule("regressed")]),
    st.builds(SlotRule, st.sampled_from(["top-p", "odp", "saliency"]), st.floats(0, 1e6)),
)
CHOICES = st.one_of(
    st.builds(BlockChoice, st.sampled_from(PARTS), st.sampled_from((*PARTS, "reuse-slots"))),
    st.builds(BlockChoice, st.sampled_from(PARTS), st.just("compute"), RULES, st.booleans()),
    st.just(FOLLOW),
)
REUSE, FORECAST, SLOTS = (parse_choice(text) for text in ("reuse", "forecast", "reuse-slots"))


@given(CHOICES)
def test_choices_are_read_as_they_are_written(choice: BlockChoice) -> None:
    assert parse_choice(choice.text) == choice


def test_texts_are_those_of_the_table_of_choices() -> None:
    assert [parse_choice(t).attention for t in ("reuse", "skip-attention", "forecast-mixture")] == [
        "reuse",
        "skip",
        "compute",
    ]
    assert parse_choice("forecast-attention+top-p:0.4") == BlockChoice("forecast", slots=SlotRule("top-p", 0.4))
    assert parse_choice("skip-shared") == BlockChoice(shared=False)
    assert FULL.text == "full"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no choice"),
        ("half", "no choice of a block"),
        ("follow-attention", "no choice of a block"),
        ("follow+top1", "no choice of a block"),
        ("top-p", "needs threshold"),
        ("top1:0.3", "has no threshold"),
        ("top-p:nan", "finite number"),
        ("odp:-1", "at least 0"),
        ("top-p:x", "a threshold is a finite number"),
        ("reuse-attention+skip-attention", "twice what becomes of its attention"),
        ("reuse-mixture+reuse-slots", "twice what becomes of its mixture"),
        ("top1+regressed", "two rules"),
        ("reuse-mixture+top1", "not computed has no slots"),
        ("skip-mixture+skip-shared", "not computed has no slots"),
    ],
)
def test_texts_that_say_nothing_are_refused(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_choice(text)


def test_a_model_is_asked_or_follows_as_a_whole() -> None:
    table = table_of([[[FULL, FULL]], [[FOLLOW, FOLLOW]], [[REUSE, FULL]], [[FOLLOW, FOLLOW]], [[FULL, FULL]]])
    assert table.followed == (1, 3) and [table.follows(k) for k in range(5)] == [False, True, False, True, False]
    assert [table.asked_before(k) for k in range(5)] == [(), (0,), (0,), (0, 2), (0, 2)]
    guided = table_of([[[FULL], [FULL]], [[FOLLOW], [FOLLOW]]], ("compute", "off"))
    assert [guided.computes_null(k) for k in range(2)] == [True, False] and full_table(3, 2).followed == ()


@pytest.mark.parametrize(
    ("cells", "null", "told"),
    [
        ([[[FULL, FULL]], [[FOLLOW, FULL]]], (), "evaluation 1 follows in some blocks, and not in others"),
        ([[[FULL], [FULL]], [[FOLLOW], [FULL]]], ("compute", "off"), "evaluation 1 follows in some blocks"),
        ([[[FULL], [FULL]], [[FULL], [FOLLOW]]], ("compute", "compute"), "evaluation 1 follows in some blocks"),
        ([[[FOLLOW]], [[FULL]]], (), "evaluation 0 follows, and there is none before it"),
        ([[[FULL], [FULL]], [[FOLLOW], [FOLLOW]]], ("compute", "compute"), "follows, and predicts the null class"),
        ([[[FULL]], [[FOLLOW]], [[parse_choice("skip")]]], (), None),
    ],
)
def test_tables_whose_predictions_follow(
    cells: list[list[list[BlockChoice]]], null: tuple[NullChoice, ...], told: str | None
) -> None:
    if told is None:
        assert table_of(cells, null).followed == (1,)
        return
    with pytest.raises(ValueError, match=told):
        table_of(cells, null)


def test_a_table_keeps_each_choice_once() -> None:
    table = table_of([[[FULL, FULL]], [[REUSE, FULL]], [[REUSE, REUSE]]])
    assert table.choices == (FULL, REUSE)
    assert [[table.at(e, 0, b) for b in range(2)] for e in range(3)] == [[FULL, FULL], [REUSE, FULL], [REUSE, REUSE]]
    assert (table.evaluations, table.branches) == (3, 1)
    assert full_table(3, 2) == table_of([[[FULL, FULL]]] * 3)


@pytest.mark.parametrize("choice", [REUSE, FORECAST, SLOTS, parse_choice("reuse-attention"), parse_choice("forecast")])
def test_nothing_is_reused_before_it_was_computed(choice: BlockChoice) -> None:
    with pytest.raises(ValueError, match=r"(was|were) not computed before"):
        table_of([[[choice]], [[FULL]]])
    table_of([[[FULL]], [[choice]]])


def test_slots_of_a_mixture_in_part_are_not_reused() -> None:
    with pytest.raises(ValueError, match="slots were not computed"):
        table_of([[[parse_choice("top1")]], [[SLOTS]]])
    table_of([[[FULL]], [[SLOTS]], [[SLOTS]]])


def test_the_null_branch_counts_where_the_null_class_is_predicted() -> None:
    pair = [[FULL], [FULL]]
    with pytest.raises(ValueError, match="block 0: its attention was not computed"):
        table_of([pair, [[FULL], [REUSE]], pair], ["off", "compute", "compute"])
    with pytest.raises(ValueError, match="null class is reused before"):
        table_of([pair, pair], ["reuse", "compute"])
    assert table_of([pair, pair], ["compute", "reuse"]).computes_null(0)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (ComputeTable((FULL,), (((0,),), ((1,),))), "beyond the 1"),
        (ComputeTable((FULL,), (((0,),), ((0, 0),))), "branches of 1 blocks"),
        (ComputeTable((FULL,), (((0,),),), ("compute",)), "2 branches"),
        (ComputeTable((FULL,), (((0,), (0,)),), ("compute", "off")), "2 choices of the null class"),
        (ComputeTable((FULL, REUSE), (((0,),), ((1,),)), residual=0.1), "by residuals and by cells"),
        (ComputeTable((FULL,), (((0,),),), residual=float("inf")), "threshold of residuals"),
    ],
)
def test_tables_that_do_not_fit_together_are_refused(table: ComputeTable, told: str) -> None:
    from ditmoe_cli.model.block_choices import check_table

    with pytest.raises(ValueError, match=told):
        check_table(table)


def test_rules_are_those_that_occur() -> None:
    used, other = parse_choice("top-p:0.4"), parse_choice("saliency:0.1")
    table = table_of([[[used, FULL]]])
    assert table.rules == {"top-p"}
    assert ComputeTable((used, other), (((0, 0),),)).rules == {"top-p"}


def test_every_pair_of_parts_has_a_text_of_its_own() -> None:
    texts = {BlockChoice(a, m).text for a, m in product(PARTS, (*PARTS, "reuse-slots"))}  # type: ignore[arg-type]
    assert len(texts) == len(PARTS) * (len(PARTS) + 1)
