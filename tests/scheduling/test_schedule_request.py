"""What may be asked of a schedule, and what it is told to take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import make_pico

from ditmoe_cli.diffusion.compute_schedule import ScheduledSampling
from ditmoe_cli.errors import DitmoeError, InfeasibleError, UsageError
from ditmoe_cli.model.compute_cost import fixed_cost
from ditmoe_cli.scheduling.schedule_request import Asked, check_asked, schedule_estimate

CONFIG = make_pico(sampler="rf").config
WAY = ScheduledSampling("euler", 8)


@pytest.mark.parametrize(
    "asked",
    [
        Asked(flops=0.5),
        Asked(flops=1.0),
        Asked(max_damage=0.0),
        Asked("a-sdm", flops=0.5),
        Asked("fora:2"),
        Asked("odp", images=8),
    ],
)
def test_what_may_be_asked(asked: Asked) -> None:
    assert check_asked(asked, CONFIG, WAY) is asked


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Asked(), "flops, max_damage: nothing says how much to save; give one, as flops 0.6"),
        (Asked(flops=0.5, max_damage=0.1), "both are given; give one"),
        (Asked("a-sdm"), "nothing says how much to save"),
        (Asked("fora:2", flops=0.5), "flops: has no effect beside method fora:2; leave one out"),
        (Asked("odp", max_damage=0.5), "max_damage: has no effect beside method odp"),
        (Asked(flops=0.0), "flops 0: must be a share of all operations, above 0 and at most 1"),
        (Asked(flops=-0.1), "above 0 and at most 1"),
        (Asked(flops=1.01), "above 0 and at most 1"),
        (Asked(flops=float("nan")), "above 0 and at most 1"),
        (Asked(max_damage=-1.0), "max_damage -1: must be at least 0, as 0.001"),
        (Asked(max_damage=float("inf")), "must be at least 0"),
        (Asked(max_damage=float("nan")), "must be at least 0"),
        (Asked(flops=0.5, images=7), "images 7: a schedule is chosen on at least 8 images"),
    ],
)
def test_what_may_not(asked: Asked, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_asked(asked, CONFIG, WAY)
    assert said in str(refused.value)


@pytest.mark.parametrize("method", ["planned", "a-sdm"])
@pytest.mark.parametrize(
    "way", [WAY, ScheduledSampling("euler", 8, 2.0), ScheduledSampling("heun", 8, 2.0, (0.2, 0.6))]
)
def test_the_least_is_told_before_anything_is_done(way: ScheduledSampling, method: str) -> None:
    """It is what the ends of the model take where it is asked, the null class left out; what is told may be given."""
    with pytest.raises(
        InfeasibleError, match=r"flops 0\.0001: the least that can be chosen here is (0\.\d+) of all"
    ) as no:
        check_asked(Asked(method, flops=0.0001), CONFIG, way)
    told = float(str(no.value).split(" of all")[0].split()[-1])
    asked = len(way.times) if method == "a-sdm" else 1
    least = asked * fixed_cost(CONFIG) / way.operations(CONFIG)
    assert 0 <= told - least <= 0.001
    assert check_asked(Asked(method, flops=told), CONFIG, way).flops == told
    assert check_asked(Asked(max_damage=1e-9), CONFIG, way).flops is None


def test_one_expert_a_token() -> None:
    config = make_pico(sampler="rf", top_k=1).config
    with pytest.raises(DitmoeError, match="one expert a token"):
        check_asked(Asked("top1"), config, WAY)
    assert check_asked(Asked(flops=0.5), config, WAY)


def test_estimates_grow_with_what_is_asked() -> None:
    def work(asked: Asked, way: ScheduledSampling = WAY) -> float:
        return schedule_estimate(asked, CONFIG, way).effort.flops

    planned = Asked(flops=0.5)
    assert work(Asked("fora:2")) < work(Asked("odp")) < work(planned)
    assert work(planned) < work(replace(planned, images=64)) and work(planned) < work(replace(planned, bins=20))
    assert work(planned) < work(planned, replace(WAY, cfg=2.0)) and work(planned) < work(
        planned, replace(WAY, steps=16)
    )
