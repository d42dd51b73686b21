"""What a file's history records: options and errors of one width, known in size before anything is measured."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Experts, Formats, Repair, Rounding
from ditmoe_cli.compression.recorded import Measured, fixed, planned_step, with_measured

numbers = st.floats(0) | st.just(math.nan)


@given(st.lists(numbers, max_size=9))
def test_numbers_are_texts_of_one_width_that_give_four_digits_back(values: list[float]) -> None:
    texts = fixed(values)
    assert {len(text) for text in texts} <= {9}
    for value, text in zip(values, texts, strict=True):
        if 1e-99 < value < 9e99:
            assert float(text) == pytest.approx(value, rel=1e-3)
        elif value < 1e-99:
            assert float(text) == 0


def plan_of(*stages: Experts | Formats, **options: object) -> CompressionPlan:
    return CompressionPlan("prune", "a" * 64, "b" * 64, options, stages)


BLOCKS = (BlockPlan((0,), "ghost"),) * 3


@pytest.mark.parametrize(
    ("plan", "measured"),
    [
        (plan_of(Experts(BLOCKS, repair=Repair())), Measured(refit_error=(0.1, 2.0, 3e-7))),
        (plan_of(Experts(BLOCKS)), Measured()),
        (plan_of(Formats({}, Rounding())), Measured((), 0.25, (1.0, 0.5, 0.0))),
        (plan_of(Formats({"x": "nf4"})), Measured()),
    ],
)
def test_the_planned_step_is_as_long_as_the_measured_one(plan: CompressionPlan, measured: Measured) -> None:
    planned = planned_step(plan, (2,) * 3)
    done = with_measured(planned, measured)
    assert planned.measured.keys() == done.measured.keys() == measured.recorded().keys()
    for name, texts in done.measured.items():
        assert [len(text) for text in texts] == [len(text) for text in planned.measured[name]]
        found = measured.to_json()[name]
        assert list(map(float, texts)) == pytest.approx(found if isinstance(found, list) else [found], rel=1e-3)


def test_figures_of_a_choice_are_no_options() -> None:
    plan = plan_of(
        keep="0.5", solver="cbc", bound=1.0, predicted_error=0.1, tried_error=0.2, gap=math.pi, undecided=True
    )
    step = planned_step(plan, (2,))
    assert step.options == {"keep": "0.5"}
    assert {name: float(text) for name, (text,) in step.measured.items()} == {
        "predicted_error": 0.1,
        "tried_error": 0.2,
        "gap": 3.142,
    }
