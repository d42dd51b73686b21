"""Schedules as they are chosen: within the operations or the damage, never behind what was tried, twice the same."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from cases import with_slow
from ways import way_of

from ditmoe_cli.diffusion.compute_schedule import CONSTANT, ENERGY, SCALE, SLOPES, ScheduledSampling
from ditmoe_cli.diffusion.scheduled_guidance import statistics_of
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.model.block_choices import check_table, full_table
from ditmoe_cli.scheduling import chosen_schedule as chosen
from ditmoe_cli.scheduling.chosen_schedule import Planning, chosen_schedule, fewer_steps_than, image_shares
from ditmoe_cli.scheduling.schedule_request import Asked
from ditmoe_cli.scheduling.way_states import Way, by_table, visited
from ditmoe_cli.scheduling.whole_methods import whole_table

IMAGES, BINS = 8, 3
WAYS = {
    "plain": (ScheduledSampling("euler", 8), {}),
    "guided": (ScheduledSampling("euler", 8, 2.0, (0.3, 0.9)), {}),
    "ancestral": (ScheduledSampling("ddpm", 8, 1.5), {"learn_sigma": True}),
    "one expert": (ScheduledSampling("heun", 4), {"top_k": 1}),
    "compressed": (
        ScheduledSampling("euler", 8, 2.0),
        {"widths": ((16, 8, 24),) * 2, "expert_of": ((0, 1, -1, 2), (2, 0, 1, -1))},
    ),
}


@cache
def planning(name: str) -> tuple[Way, Planning]:
    sampling, changes = WAYS[name]
    way = way_of(sampling, **changes)
    return way, Planning(way, IMAGES, BINS)


def asked(method: str = "planned", flops: float | None = None, max_damage: float | None = None) -> Asked:
    return Asked(method, flops, max_damage, IMAGES, BINS)


@pytest.mark.parametrize(
    ("name", "flops"),
    with_slow([("guided", 0.3), ("ancestral", 0.6), ("compressed", 0.3), ("plain", 0.6), ("one expert", 0.3)], quick=3),
)
def test_operations_are_within_the_budget_and_damages_are_those_of_the_images(name: str, flops: float) -> None:
    way, plans = planning(name)
    found = plans.chosen(asked(flops=flops))
    best = found.best
    assert best.flops <= flops * (1 + 1e-6) and best.damage <= best.bound
    check_table(best.table)
    within = [each for each in found.others if each.flops <= flops]
    assert all(best.typical <= each.typical for each in within) and best.typical <= best.damage * (1 + 1e-9)
    assert {"planned", "fora:2", "taylor:2", "follow:2"} <= {each.name for each in (best, *found.others)}
    # what a run by the table and its statistics alone makes of the images
    images = image_shares(IMAGES)[1]
    statistics = statistics_of(found.arrays, best.table.evaluations, BINS)
    again = by_table(way, images, best.table, statistics, slopes=found.arrays.get(SLOPES))
    whole = visited(way, images)
    assert torch.equal(again.final, best.final) and torch.equal(found.full, whole.final)
    seen = way.shown(whole.final).double()
    off = (way.shown(again.final).double() - seen).square().sum() / seen.square().sum()
    assert best.damage == pytest.approx(float(off))
    assert best.flops == pytest.approx(again.flops / whole.flops)
    assert best.kept == again.count.most_kept / len(images)


@pytest.mark.parametrize("name", with_slow(["guided", "ancestral", "compressed", "plain", "one expert"], quick=3))
def test_all_operations_do_no_damage(name: str) -> None:
    best = planning(name)[1].chosen(asked(flops=1.0)).best
    assert (best.damage, best.bound) == (0.0, 0.0)
    assert best.flops <= 1.0


@pytest.mark.parametrize("name", with_slow(["plain", "guided"]))
def test_damages_stay_within_their_bound(name: str) -> None:
    _, plans = planning(name)
    shares = []
    for most in (1e-2, 0.0):
        found = plans.chosen(asked(max_damage=most))
        assert found.best.damage <= found.best.bound <= most
        assert all(found.best.flops <= each.flops for each in found.others if each.bound <= most)
        shares.append(found.best.flops)
    assert shares == sorted(shares)


@pytest.mark.parametrize("name", ["plain", "guided"])
def test_reused_blocks_take_the_operations_that_were_planned(name: str) -> None:
    """Nothing of them depends on tokens: what the program counts is what a run counts, in both branches."""
    way, plans = planning(name)
    found = plans.chosen(asked("a-sdm", flops=0.7))
    texts = {choice.text for choice in found.best.table.choices}
    assert texts <= {"full", "reuse"} and found.best.name == "a-sdm" and found.arrays == {}
    assert found.best.table.null == way.sampling.null
    assert all(each.name == "a-sdm" for each in found.others)
    assert found.best.flops <= 0.7 + 1e-9
    assert found.best.predicted is not None and found.best.gap is not None and 0 <= found.best.gap < 0.05


def test_too_few_operations_say_the_least() -> None:
    _, plans = planning("plain")
    with pytest.raises(InfeasibleError, match=r"flops 0\.1: the least that can be chosen here is (0\.\d+)") as no:
        plans.chosen(asked("a-sdm", flops=0.1))
    least = float(str(no.value).split(" of all")[0].split()[-1])
    assert plans.chosen(asked("a-sdm", flops=least)).best.flops <= least


@pytest.mark.parametrize("method", ["full", "fora:2", "follow:2", "odp", "regressed", "saliency:0.02", "residual:0.2"])
def test_methods_for_the_whole_model(method: str) -> None:
    way, plans = planning("guided")
    found = plans.chosen(asked(method))
    names = {"saliency": {ENERGY}, "regressed": {SCALE, CONSTANT}, "follow": {SLOPES}}
    assert set(found.arrays) == names.get(method.partition(":")[0], set())
    assert (found.best.name, found.others) == (method, ())
    if method == "full":
        assert found.best.table == full_table(8, 2, way.sampling.null)
        assert (found.best.damage, found.best.flops) == (0.0, 1.0)
        assert fewer_steps_than(found, way) is None
    else:
        assert found.best.damage > 0 and found.best.flops < 1
    if method == "fora:2":
        assert found.best.table == whole_table(method, way.model.config, way.sampling)


def test_the_same_twice() -> None:
    one = planning("guided")[1].chosen(asked(flops=0.5))
    two = chosen_schedule(way_of(WAYS["guided"][0]), asked(flops=0.5))
    assert one.best.table == two.best.table and torch.equal(one.best.final, two.best.final)
    assert {name: array.tolist() for name, array in one.arrays.items()} == {
        name: array.tolist() for name, array in two.arrays.items()
    }
    assert [each.damage for each in one.others] == [each.damage for each in two.others]


def test_fewer_steps_take_no_more_operations() -> None:
    way, plans = planning("guided")
    found = plans.chosen(asked("fora:2"))
    fewer = fewer_steps_than(found, way)
    assert fewer is not None
    assert fewer.evaluations <= found.best.flops * sum(1 + (null == "compute") for null in way.sampling.null)
    ancestral, others = planning("ancestral")
    assert fewer_steps_than(others.chosen(asked("fora:2")), ancestral) is None


def test_images_that_are_measured_on_are_not_tried_on() -> None:
    assert image_shares(32) == (range(8), range(8, 32))
    assert image_shares(9) == (range(2), range(2, 9))


def test_where_thresholds_let_too_much_pass_it_is_said() -> None:
    _, plans = planning("plain")
    tries = [plans.chosen(asked("fora:2")).best]
    with pytest.raises(InfeasibleError, match=r"flops 0\.2: the fewest that came out are 0\.\d+; give that or more"):
        chosen._best(tries, asked(flops=0.2))
