"""The training loop: the course of a run, AdamW, averaged weights, the best of them, parts of a batch, going on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from interrupting import StoppedError, stopping_after
from torch import Tensor

from ditmoe_cli.compression.training.training_loop import (
    BARE,
    Course,
    Means,
    Objective,
    Trained,
    accumulate,
    train,
)
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files import pacing
from ditmoe_cli.files.workfolder import WorkFolder, open_work

STATES = 40
COURSE = Course(steps=60, batch=8, rate=0.05, checks=6)


class Regression:
    """A linear map to be found from noisy values: two weights of sizes that differ by a thousand."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(STATES + 16, 5, generator=generator)
        self.y = (
            self.x @ torch.tensor([4.0, -2.0, 1.0, 3.0, 0.5])
            + 0.002
            + 0.1 * torch.randn(len(self.x), generator=generator)
        )
        self.weights = {
            "w": torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0], requires_grad=True),
            "b": torch.tensor([-0.003], requires_grad=True),
        }

    def errors(self, rows: Tensor) -> Tensor:
        return (self.x[rows] @ self.weights["w"] + self.weights["b"] - self.y[rows]).square()

    def judge(self) -> float:
        with torch.no_grad():
            return float(self.errors(torch.arange(STATES, STATES + 16)).mean())

    @property
    def objective(self) -> Objective:
        return Objective(STATES, self.errors, self.judge)

    def trained(self, course: Course = COURSE, means: Means = BARE) -> Trained:
        return train(self.weights, self.objective, course, "training", means)

    def values(self) -> dict[str, list[float]]:
        return {name: weight.tolist() for name, weight in self.weights.items()}


# courses


@pytest.mark.parametrize(("batch", "states"), [(8, 40), (8, 41), (16, 7), (5, 5), (1, 3)])
def test_each_pass_takes_every_state_once(batch: int, states: int) -> None:
    course = Course(steps=1000, batch=batch, seed=3)
    places = torch.cat([course.rows(step, states) for step in range(3 * states)])
    passes = [sorted(part.tolist()) for part in torch.split(places, states) if len(part) == states]
    assert len(passes) >= 3 and all(part == list(range(states)) for part in passes)
    assert all(len(course.rows(step, states)) == batch for step in range(4))


def test_the_order_is_of_the_seed_and_of_the_pass() -> None:
    orders = [
        tuple(Course(steps=1, batch=32, seed=seed).rows(number, 32).tolist()) for seed in (0, 1) for number in (0, 1)
    ]
    assert len(set(orders)) == 4
    assert orders[1] == tuple(Course(steps=9, batch=32).rows(1, 32).tolist()), "whatever the number of steps"


@pytest.mark.parametrize(("steps", "checks"), [(60, 6), (7, 3), (100, 25), (3, 25), (1, 1), (41, 2)])
def test_checks_are_evenly_spaced_and_one_is_at_the_end(steps: int, checks: int) -> None:
    course = Course(steps=steps, checks=checks)
    seen = [done for done in range(1, steps + 1) if course.is_check(done)]
    assert len(seen) == min(checks, steps) and seen[-1] == steps
    gaps = [b - a for a, b in zip([0, *seen], seen, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_the_rate_rises_and_falls() -> None:
    course = Course(steps=200)
    factors = [course.factor(step) for step in range(200)]
    assert factors[0] == pytest.approx(0.1) and 0.98 < max(factors) <= 1.0 and factors[-1] < 1e-3
    top = factors.index(max(factors))
    assert top == 9, "at a twentieth of the steps"
    assert factors[: top + 1] == sorted(factors[: top + 1]) and factors[top:] == sorted(factors[top:], reverse=True)
    assert Course(steps=1).factor(0) == 1.0


# what a step does


def test_the_first_step_changes_each_weight_by_its_share() -> None:
    """AdamW's first step is the sign of the gradient times the rate, whatever the gradient."""
    regression = Regression()
    before = {name: weight.detach().clone() for name, weight in regression.weights.items()}
    course = Course(steps=1, batch=8, rate=0.01, checks=1)
    regression.trained(course)
    changed = {name: (weight - before[name]).abs() for name, weight in regression.weights.items()}
    for name, size in (("w", 2.0), ("b", 2.0**-8)):
        # the averaged weights are taken, of which a tenth is still as before
        expected = torch.full_like(changed[name], 0.01 * size * 0.9)
        torch.testing.assert_close(changed[name], expected, rtol=1e-3, atol=0)


def test_training_learns_and_leaves_the_best_weights() -> None:
    regression = Regression()
    before = regression.judge()
    result = regression.trained()
    assert result.before == before and result.after < 0.2 * before
    assert regression.judge() == result.after == min(check.error for check in result.checks)
    assert [check.step for check in result.checks] == [10, 20, 30, 40, 50, 60]
    assert all(weight.is_leaf and weight.requires_grad for weight in regression.weights.values())


def test_the_losses_that_are_told_are_means_since_the_check_before() -> None:
    regression, seen = Regression(), list[float]()
    errors = regression.errors

    def recorded(rows: Tensor) -> Tensor:
        found = errors(rows)
        seen.append(float(found.detach().mean()))
        return found

    result = train(regression.weights, Objective(STATES, recorded, regression.judge), COURSE, "training")
    for number, check in enumerate(result.checks):
        assert check.loss == pytest.approx(sum(seen[10 * number : 10 * (number + 1)]) / 10, rel=1e-5)


def test_equal_seeds_give_equal_bits_and_others_do_not() -> None:
    values = []
    for seed in (0, 0, 1):
        regression = Regression()
        regression.trained(Course(steps=30, batch=8, seed=seed, checks=3))
        values.append(regression.values())
    assert values[0] == values[1] != values[2]


def test_a_useless_rate_leaves_the_weights_as_they_were() -> None:
    regression = Regression()
    regression.weights["w"].data = torch.tensor([4.0, -2.0, 1.0, 3.0, 0.5])
    regression.weights["b"].data.fill_(0.002)
    before = regression.values()
    result = regression.trained(Course(steps=40, batch=8, rate=0.9, checks=8))
    assert result.after == result.before and all(check.error > result.before for check in result.checks)
    assert regression.values() == before


# parts of a batch


@pytest.mark.parametrize("part", [0, 1, 3, 8, 100])
def test_parts_give_the_gradients_of_the_whole(part: int) -> None:
    regression, rows = Regression(), torch.arange(8)
    total, used = accumulate(regression.weights, regression.errors, rows, part)
    assert used == part
    grads = torch.autograd.grad(regression.errors(rows).mean(), list(regression.weights.values()))
    torch.testing.assert_close(total, regression.errors(rows).mean().detach())
    for weight, grad in zip(regression.weights.values(), grads, strict=True):
        torch.testing.assert_close(weight.grad, grad)


def test_what_no_loss_depends_on_has_a_gradient_of_zero() -> None:
    weights = {"used": torch.ones(2, requires_grad=True), "unused": torch.ones(3, requires_grad=True)}
    accumulate(weights, lambda rows: weights["used"].sum() * rows.float(), torch.arange(4))
    assert weights["unused"].grad is not None and not weights["unused"].grad.any()


def failing_above(size: int, errors: Callable[[Tensor], Tensor], error: Exception) -> Callable[[Tensor], Tensor]:
    def losses(rows: Tensor) -> Tensor:
        if len(rows) > size:
            raise error
        return errors(rows)

    return losses


OUT_OF_MEMORY = (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 B"))


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["python", "torch"])
def test_out_of_memory_halves_the_part_to_the_same_result(error: Exception) -> None:
    plain, short, notes = Regression(), Regression(), list[str]()
    expected = plain.trained()
    objective = Objective(STATES, failing_above(3, short.errors, error), short.judge)
    found = train(short.weights, objective, COURSE, "training", Means(note=notes.append))
    assert found.after == pytest.approx(expected.after, rel=1e-3)
    for name, weight in plain.weights.items():
        torch.testing.assert_close(short.weights[name], weight, rtol=1e-3, atol=1e-6)
    assert notes == [
        f"out of memory with {size} states at once: going on with {half}, to the same gradients"
        for size, half in ((8, 4), (4, 2))
    ], "told once, since the part stays"


def test_memory_for_not_even_one_state_and_other_errors_end_training() -> None:
    regression = Regression()
    for size, error in ((0, MemoryError("none")), (3, RuntimeError("a shape is wrong"))):
        objective = Objective(STATES, failing_above(size, regression.errors, error), regression.judge)
        with pytest.raises(type(error), match=str(error)):
            train(regression.weights, objective, COURSE, "training")


# values that are not finite


def test_values_that_are_not_finite_before_training_are_refused() -> None:
    regression = Regression()
    regression.weights["w"].data[0] = math.nan
    with pytest.raises(BadInputError, match="not finite"):
        regression.trained()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_cease_to_be_finite_end_training_with_the_best_weights(value: float) -> None:
    regression, calls, notes = Regression(), [0], list[str]()

    def losses(rows: Tensor) -> Tensor:
        calls[0] += 1
        return regression.errors(rows) * (value if calls[0] == 26 else 1.0)

    result = train(
        regression.weights, Objective(STATES, losses, regression.judge), COURSE, "training", Means(note=notes.append)
    )
    assert notes == ["warning: values ceased to be finite at step 26: training ends there"]
    assert [check.step for check in result.checks] == [10, 20] and calls[0] == 26
    assert regression.judge() == result.after < result.before


def test_an_error_that_ceases_to_be_finite_ends_training_with_the_best_weights() -> None:
    regression, judged, notes = Regression(), list[float](), list[str]()

    def judge() -> float:
        judged.append(math.nan if len(judged) == 3 else regression.judge())
        return judged[-1]

    result = train(
        regression.weights, Objective(STATES, regression.errors, judge), COURSE, "training", Means(note=notes.append)
    )
    assert len(judged) == 4 and len(notes) == 1 and result.after == min(judged[:3])
    assert regression.judge() == result.after


# going on


def run_in(folder: Path, values: list[Mapping[str, list[float]]]) -> Trained:
    regression = Regression()
    with open_work(folder / "x", "key", lambda _: None) as work:
        result = regression.trained(means=Means(work))
        values.append(regression.values())
        raise StoppedError(result)


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "WORK_PER_KEEPING", 0.0)
    whole = Regression()
    expected = whole.trained()
    for pieces in (1, 2, 5):
        with pytest.raises(StoppedError), stopping_after(pieces) as kept:
            run_in(tmp_path, values := list[Mapping[str, list[float]]]())
        assert kept == ["training"] * pieces and not values
        with stopping_after(10**6) as rest, pytest.raises(StoppedError) as ended:
            run_in(tmp_path, values)
        assert ended.value.args[0] == expected and values == [whole.values()]
        assert len(rest) == 6 - pieces, "only what was still to be done"
        (tmp_path / ".x.work" / "training.safetensors").unlink()


def test_a_part_that_memory_sufficed_for_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "WORK_PER_KEEPING", 0.0)
    work = WorkFolder(tmp_path, "key", lambda _: None)
    short, notes = Regression(), list[str]()
    objective = Objective(STATES, failing_above(3, short.errors, MemoryError()), short.judge)
    with pytest.raises(StoppedError), stopping_after(2):
        train(short.weights, objective, COURSE, "training", Means(work, notes.append))
    assert len(notes) == 2
    again = Regression()
    objective = Objective(STATES, failing_above(3, again.errors, MemoryError()), again.judge)
    train(again.weights, objective, COURSE, "training", Means(work, notes.append))
    assert len(notes) == 2, "nothing is tried anew"
