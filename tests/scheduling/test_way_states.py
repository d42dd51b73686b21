"""Ways of images: with everything computed they are those of sampling, and tables go on from what was predicted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from schedules import by_evaluation
from ways import way_of

from ditmoe_cli.diffusion.compute_schedule import ScheduledSampling
from ditmoe_cli.diffusion.guidance import guided_predictor
from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.diffusion.solvers import integrate
from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.model.block_choices import full_table
from ditmoe_cli.scheduling.way_states import PURPOSE, by_solver, by_table, visited

WAYS = [
    ScheduledSampling("euler", 6),
    ScheduledSampling("heun", 4, 2.0),
    ScheduledSampling("ab2", 6, 2.0, (0.3, 0.8)),
    ScheduledSampling("ddim", 6, 2.0),
    ScheduledSampling("ddpm", 6, 1.5),
]


@pytest.mark.parametrize("sampling", WAYS, ids=lambda way: way.told)
def test_the_way_with_everything_computed(sampling: ScheduledSampling) -> None:
    """States, predictions and images are those of plain guided sampling, to the bit."""
    way = way_of(sampling, learn_sigma=sampling.solver == "ddpm")
    seen = visited(way, range(3))
    plain = guided_predictor(way.model, way.labels(range(3)), sampling.guidance, times=sampling.times)
    noise = image_noise(0, range(3), torch.device("cpu"), PURPOSE)
    states = []

    def predict(x: torch.Tensor, t: float) -> torch.Tensor:
        states.append(x)
        return plain(x, t)

    with torch.inference_mode():
        final = integrate(
            sampling.solver, sampling.steps, predict, noise.draw((1, 8, 8)), lambda _: noise.draw((1, 8, 8))
        )
    assert torch.equal(seen.final, final) and torch.equal(seen.states, torch.stack(states))
    assert len(seen.predictions) == len(sampling.times)
    assert torch.equal(by_solver(way, range(3), sampling), final)
    assert seen.flops == pytest.approx(sampling.operations(way.model.config))


@pytest.mark.parametrize("sampling", WAYS, ids=lambda way: way.told)
def test_a_full_table_ends_where_everything_is_computed(sampling: ScheduledSampling) -> None:
    way = way_of(sampling)
    seen = visited(way, range(2))
    found = by_table(way, range(2), full_table(len(sampling.times), 2, sampling.null))
    assert torch.equal(found.final, seen.final)
    assert (found.flops, found.count.most_kept) == (seen.flops, 0)


@pytest.mark.parametrize("sampling", WAYS, ids=lambda way: way.told)
def test_predictions_that_are_known_need_not_be_made(sampling: ScheduledSampling) -> None:
    """The table computes everything in the first three evaluations, of which later ones take the third alone."""
    way = way_of(sampling)
    seen = visited(way, range(2))
    saved = by_evaluation(sampling, lambda k: "reuse" if k > 2 and k % 2 else "full")
    whole = by_table(way, range(2), saved)
    for before in (0, 1, 2):
        found = by_table(way, range(2), saved, before=list(seen.predictions[:before]))
        assert torch.allclose(found.final, whole.final, atol=1e-4)
        assert (found.flops < whole.flops) == (before > 0)
    assert not torch.equal(whole.final, seen.final)


def test_images_do_not_depend_on_those_beside_them() -> None:
    way = way_of(WAYS[1])
    assert torch.equal(visited(way, range(1, 3)).final, visited(way, range(3)).final[1:])
    assert way.labels(range(5)).tolist() == [0, 2, 1, 0, 2]
    other = visited(replace(way, seed=1), range(3)).final
    assert not torch.equal(other, visited(way, range(3)).final)


def test_a_weaker_model_guides_both() -> None:
    sampling = ScheduledSampling("euler", 4, guide=Guide("f" * 64, 0.5, (0.0, 0.6)))
    weak = way_of(sampling, seed=1).model
    way = way_of(sampling, weak=weak)
    seen = visited(way, range(2))
    found = by_table(way, range(2), full_table(4, 2))
    assert torch.equal(found.final, seen.final)
    assert not torch.equal(seen.final, visited(way_of(ScheduledSampling("euler", 4)), range(2)).final)


def test_pixels_are_seen_within_their_range_and_latents_as_they_are() -> None:
    sampling = ScheduledSampling("euler", 2)
    z = torch.tensor([-3.0, -1.0, 0.5, 2.0])
    assert way_of(sampling, in_channels=1).shown(z).tolist() == [-1.0, -1.0, 0.5, 1.0]
    assert torch.equal(way_of(sampling, in_channels=4).shown(z), z)
