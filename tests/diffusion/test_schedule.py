"""Solvers by name, upstream's spacing of steps, and the times of model evaluations."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.diffusion.schedule import (
    DEFAULT_SOLVER,
    SOLVERS,
    UPSTREAM,
    ancestral_timesteps,
    choose_solver,
    ddim_timesteps,
    evaluation_times,
    flow_times,
    is_guided,
    noise_level,
    trailing_timesteps,
)
from ditmoe_cli.errors import UsageError


def space_timesteps(count: int) -> list[int]:
    """The spacing of improved-diffusion for one section, by accumulation as there."""
    stride = 1.0 if count <= 1 else 999 / (count - 1)
    position, found = 0.0, []
    for _ in range(count):
        found.append(round(position))
        position += stride
    return found


def test_ancestral_steps_are_upstreams() -> None:
    for steps in (*range(2, 60), 100, 125, 200, 250, 333, 500, 777, 999, 1000):
        assert ancestral_timesteps(steps) == space_timesteps(steps)


def test_documented_step_lists() -> None:
    assert flow_times(4) == [1, 0.75, 0.5, 0.25]
    assert ancestral_timesteps(10) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert ancestral_timesteps(4) == [0, 333, 666, 999]
    assert ancestral_timesteps(1000) == list(range(1000))
    assert ddim_timesteps(10) == list(range(0, 1000, 100))
    assert ddim_timesteps(50) == list(range(0, 1000, 20))
    assert ddim_timesteps(250) == list(range(0, 1000, 4))
    assert ddim_timesteps(3) == [0, 334, 668], "a stride of 333 would give four"
    assert ddim_timesteps(1000) == list(range(1000))
    assert ddim_timesteps(300)[:4] == [0, 3, 6, 10], "no stride gives 300 steps"
    assert ddim_timesteps(300)[-1] == 996


@given(steps=st.integers(1, 1000))
def test_ddim_steps_take_the_smallest_stride_that_fits(steps: int) -> None:
    found = ddim_timesteps(steps)
    assert len(found) == steps
    assert found[0] == (0 if steps > 1 else 999)
    assert found[-1] <= 999
    gaps = {b - a for a, b in itertools.pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    fitting = [s for s in range(1, 1000) if len(range(0, 1000, s)) == steps]
    if fitting and steps > 1:
        assert gaps == {fitting[0]}
    elif steps > 1:
        assert 1000 - found[-1] <= 1000 // steps + 1, "the last step is as near to noise as the others are apart"


def test_trailing_steps_are_those_of_diffusers() -> None:
    """As `DDIMScheduler.set_timesteps` writes them; where 1000 / N is no float, its positions add up rounding."""
    for steps in (*range(1, 48), 50, 100, 125, 200, 250, 500, 1000):
        diffusers = np.round(np.arange(1000, 0, -1000 / steps)).astype(np.int64) - 1
        assert trailing_timesteps(steps) == sorted(diffusers)
    assert trailing_timesteps(4) == [249, 499, 749, 999]


@given(few=st.integers(1, 60), times=st.integers(1, 16))
def test_trailing_steps_are_among_those_of_a_multiple(few: int, times: int) -> None:
    found = trailing_timesteps(few)
    assert set(found) <= set(trailing_timesteps(few * times))
    assert len(set(found)) == few
    assert found[0] >= 0 and found[-1] == 999


@pytest.mark.parametrize("spacing", [ancestral_timesteps, ddim_timesteps, trailing_timesteps])
def test_a_single_step_is_at_pure_noise(spacing: Callable[[int], list[int]]) -> None:
    """Upstream's would be at 0, as `space_timesteps` has it, where noise passes for an image."""
    assert space_timesteps(1) == [0]
    assert spacing(1) == [999]


@given(steps=st.integers(1, 60), solver=st.sampled_from(sorted(SOLVERS)))
def test_evaluation_times_fall_and_are_as_many_as_said(steps: int, solver: str) -> None:
    times = evaluation_times(solver, steps)  # type: ignore[arg-type]
    twice = {"heun": steps - 1, "ab3": min(2, steps - 1)}
    assert len(times) == steps + twice.get(solver, 0)
    assert all(np.diff(times) <= 0)
    family = SOLVERS[solver].family  # type: ignore[index]
    levels = [noise_level(t, family) for t in times]
    assert min(levels) >= 0 and max(levels) <= 1


def test_guidance_holds_inside_its_interval_alone() -> None:
    assert not is_guided(0.5, 1.0, "rf")
    assert is_guided(0.5, 2.0, "rf")
    assert [is_guided(t, 2.0, "rf", (0.2, 0.6)) for t in (0.1, 0.2, 0.4, 0.6, 0.7)] == [False, True, True, True, False]
    assert [is_guided(t, 2.0, "ddpm", (0.2, 0.6)) for t in (100, 500, 700)] == [False, True, False]


def test_solvers_fit_their_family() -> None:
    for family, name in DEFAULT_SOLVER.items():
        assert SOLVERS[UPSTREAM[family][0]].family == family
        assert SOLVERS[name].family == family
        assert choose_solver(None, family) == name
    for key, kind in SOLVERS.items():
        assert choose_solver(kind.name, kind.family) == choose_solver(key, kind.family) == key
    with pytest.raises(
        UsageError, match="solver ddim: is not for rf weights; choose euler, heun, ab2, ab3, ab4, dpmpp"
    ):
        choose_solver("ddim", "rf")
    with pytest.raises(
        UsageError, match="solver heun: is not for ddpm weights; choose ddim, ddim-trailing, ddpm, dpmpp-2m"
    ):
        choose_solver("heun", "ddpm")
    with pytest.raises(UsageError, match="unknown; choose euler"):
        choose_solver("heun9", "rf")
