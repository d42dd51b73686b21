"""Fewer steps as the rival of a schedule: within the operations, and a solver that is itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import with_slow
from schedules import all_full, every_second
from ways import way_of

from ditmoe_cli.diffusion.compute_schedule import ScheduledSampling
from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.scheduling.fewer_steps import against_fewer_steps, cost_of, evaluations_of, rival_steps, weak_share
from ditmoe_cli.scheduling.way_states import by_solver, visited

WAYS = [
    ScheduledSampling("euler", 20),
    ScheduledSampling("heun", 10, 2.0),
    ScheduledSampling("ab2", 16, 2.0, (0.2, 0.7)),
    ScheduledSampling("ddim", 20, 1.5),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.told)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.99, 1.0])
def test_rivals_are_the_most_steps_within_the_evaluations(way: ScheduledSampling, share: float) -> None:
    allowed = share * evaluations_of(way)
    found = rival_steps(way, allowed)
    assert {each.solver for each in found} == (
        {"ddpm-dpmpp-2m", "ddim-trailing"} if way.solver == "ddim" else {"ab2", "ab3", "dpmpp-2m"}
    )
    for each in found:
        assert evaluations_of(each) <= allowed
        more = ScheduledSampling(each.solver, each.steps + 1, way.cfg, way.interval)
        assert evaluations_of(more) > allowed
        assert (each.cfg, each.interval) == (way.cfg, way.interval)


def test_evaluations_of_both_branches() -> None:
    assert evaluations_of(ScheduledSampling("euler", 5)) == 5
    assert evaluations_of(ScheduledSampling("euler", 5, 2.0)) == 10
    assert evaluations_of(ScheduledSampling("euler", 5, 2.0, (0.3, 0.9))) == 8
    assert evaluations_of(ScheduledSampling("heun", 5)) == 9


def test_a_weaker_model_costs_what_it_takes() -> None:
    """It guides in four of five evaluations; where a schedule does not ask the model, neither is the weaker one."""
    way = ScheduledSampling("euler", 5, guide=Guide("top1", 0.5, (0.3, 1.0)))
    assert [evaluations_of(way, weak) for weak in (0.0, 0.25, 1.0)] == [5, 6, 9]
    assert cost_of(way, all_full(way), 0.5, 0.25) == 3.5
    assert cost_of(way, every_second(way, saved="follow"), 0.6, 0.25) == 3.5
    assert {each.steps for each in rival_steps(way, 6.0, 0.25) if each.solver == "ab2"} == {5}
    assert {each.steps for each in rival_steps(way, 5.9, 0.25) if each.solver == "ab2"} == {4}
    model = way_of(way)
    assert weak_share(model) == 0 and weak_share(replace(model, weak=model.model)) == 1


def test_no_steps_are_that_few() -> None:
    assert rival_steps(ScheduledSampling("euler", 20), 0.2) == []
    way = way_of(ScheduledSampling("euler", 4))
    images = visited(way, range(2)).final
    assert against_fewer_steps(way, range(2), 0.4, images, images) is None


def test_ancestral_sampling_has_no_fine_solution() -> None:
    way = way_of(ScheduledSampling("ddpm", 4))
    images = visited(way, range(2)).final
    assert against_fewer_steps(way, range(2), 2, images, images) is None


@pytest.mark.parametrize(
    "sampling", with_slow([ScheduledSampling("ab2", 8), ScheduledSampling("ddim-trailing", 8, 1.5)])
)
def test_a_solver_that_is_itself_ties(sampling: ScheduledSampling) -> None:
    """With all operations the same steps of the same solver are among the rivals; the best errs no more."""
    way = way_of(sampling)
    images = visited(way, range(2)).final
    found = against_fewer_steps(way, range(2), evaluations_of(sampling), images, images)
    assert found is not None and found.schedule == found.full
    assert found.error <= found.full and found.wins
    if found.sampling == sampling:
        assert found.error == found.full
    again = by_solver(way, range(2), sampling)
    assert torch.equal(again, images)


def test_a_schedule_at_the_fine_solution_is_not_beaten() -> None:
    sampling = ScheduledSampling("euler", 6)
    way = way_of(sampling)
    fine = by_solver(way, range(2), ScheduledSampling("ab3", 96))
    found = against_fewer_steps(way, range(2), 3, fine, visited(way, range(2)).final)
    assert found is not None and found.schedule == 0.0 < found.error and not found.wins
    assert found.evaluations <= 3


def test_many_steps_stay_within_the_timesteps_that_there_are() -> None:
    assert [each.steps for each in rival_steps(ScheduledSampling("ddim", 1000), 1000)] == [999, 1000]
