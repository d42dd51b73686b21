"""Predictions that follow the state: slopes in closed form, runs by hand, what is kept and counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Pico
from schedules import by_evaluation, every_second

from ditmoe_cli.diffusion.compute_schedule import ScheduledSampling
from ditmoe_cli.diffusion.followed_predictions import FollowedPredictions, fitted_slopes, following, slopes_at
from ditmoe_cli.diffusion.guidance import guided_predictor
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.scheduled_guidance import Scheduled, scheduled_predictor
from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.diffusion.weak_models import weak_model
from ditmoe_cli.model.block_choices import ComputeTable
from ditmoe_cli.model.scheduled import ComputeCount

K, N, C = 6, 4, 3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table_of_third(way: ScheduledSampling) -> ComputeTable:
    """The model is asked in evaluations 0, 3, 6, ..."""
    null = ["off" if k % 3 else choice for k, choice in enumerate(way.null)]
    return by_evaluation(way, lambda k: "follow" if k % 3 else "full", null=null)


# slopes


def test_a_prediction_that_is_linear_in_the_state_is_followed_exactly() -> None:
    """o = s ⊙ z + c by channel."""
    states, slope = random(K, N, C, 5, 5), torch.tensor([0.5, -2.0, 3.0])
    predictions = slope.view(-1, 1, 1) * states + torch.tensor([1.0, 2.0, 3.0]).view(-1, 1, 1)
    found = slopes_at(states, predictions, 4, 3, None)
    assert torch.allclose(found[:, 0], slope, atol=1e-4) and torch.equal(found[:, 1], torch.zeros(C))
    followed = following(found, states[4], (states[3], predictions[3]), None)
    assert torch.allclose(followed, predictions[4], atol=1e-4)


def test_a_prediction_that_moves_evenly_is_extrapolated() -> None:
    """o_k = o_0 + k d, whatever the states are: with sources 3 and 1, b is half of it for 4, and all of it for 5."""
    states = random(K, 16, C, 8, 8)
    predictions = random(16, C, 8, 8, seed=1) + torch.arange(K).view(-1, 1, 1, 1, 1) * random(16, C, 8, 8, seed=2)
    for evaluation, factor in ((4, 0.5), (5, 1.0)):
        found = slopes_at(states, predictions, evaluation, 3, 1)
        assert torch.allclose(found[:, 1], torch.full((C,), factor), atol=1e-4)
        assert torch.allclose(found[:, 0], torch.zeros(C), atol=1e-4)
        followed = following(found, states[evaluation], (states[3], predictions[3]), predictions[1])
        assert torch.allclose(followed, predictions[evaluation], atol=1e-3)


def test_what_does_not_move_has_no_slope() -> None:
    states = random(1, N, C, 5, 5).expand(K, -1, -1, -1, -1)
    predictions = random(1, N, C, 5, 5, seed=1).expand(K, -1, -1, -1, -1)
    assert torch.equal(slopes_at(states, predictions, 4, 3, 2), torch.zeros(C, 2))


def test_slopes_leave_no_error_that_they_could_take_away() -> None:
    """Errors are orthogonal to both terms, by channel, and channels beside those of the state are taken as they are."""
    states, predictions = random(K, N, C, 5, 5), random(K, N, C + 2, 5, 5, seed=1)
    slopes = fitted_slopes(states, predictions, table_of_third(ScheduledSampling("euler", K)))
    assert slopes.shape == (K, C, 2) and not slopes[[0, 3]].any()
    assert not slopes[[1, 2], :, 1].any() and slopes[[4, 5], :, 1].all()  # before evaluation 3 there is one source
    found = following(slopes[5], states[5], (states[3], predictions[3]), predictions[0])
    assert torch.equal(found[:, C:], predictions[3][:, C:])
    off = (predictions[5] - found)[:, :C]
    for term in (states[5] - states[3], (predictions[3] - predictions[0])[:, :C]):
        inner = (off * term).transpose(0, 1).flatten(1).sum(dim=1)
        assert torch.allclose(inner, torch.zeros(C), atol=1e-2)


# runs


@pytest.mark.parametrize("guide", [None, Guide("top1", 0.5)], ids=["plain", "weak"])
@pytest.mark.parametrize(("solver", "cfg"), [("euler", 1.0), ("heun", 1.5), ("ddpm", 2.0)])
def test_runs_by_hand(pico: Callable[..., Pico], solver: str, cfg: float, guide: Guide | None) -> None:
    """Guided predictions of evaluations 0, 3, 6, ... are the model's, those between follow from the last two."""
    way = ScheduledSampling(solver, 8 if solver != "heun" else 4, cfg, guide=guide)  # type: ignore[arg-type]
    model = pico(sampler="ddpm" if solver == "ddpm" else "rf").model()
    labels, weak = torch.tensor([0, 2]), weak_model(model, guide, lambda: model)
    slopes, states = random(len(way.times), 4, 2), random(len(way.times), 2, 4, 8, 8, seed=1)
    scheduled = Scheduled(table_of_third(way), slopes=slopes)
    with torch.inference_mode():
        predict = scheduled_predictor(model, labels, way.guidance, way.times, scheduled, weak)
        found = [predict(x, t) for x, t in zip(states, way.times, strict=True)]
        plain = guided_predictor(model, labels, way.guidance, times=way.times, weak=weak)
        own = [plain(x, t) for x, t in zip(states, way.times, strict=True)]
    for k, prediction in enumerate(found):
        last = k - k % 3
        if last == k:
            assert torch.allclose(prediction, own[k], atol=1e-5)
            continue
        wanted = own[last].clone()
        wanted[:, :4] += slopes[k, :, 0].view(-1, 1, 1) * (states[k] - states[last])
        if last:
            wanted[:, :4] += slopes[k, :, 1].view(-1, 1, 1) * (own[last] - own[last - 3])[:, :4]
        assert torch.allclose(prediction, wanted, atol=1e-4)


@pytest.mark.parametrize("cfg", [1.0, 1.5])
def test_no_image_depends_on_its_batch_and_all_is_counted(pico: Callable[..., Pico], cfg: float) -> None:
    model = pico(sampler="rf").model()
    spec = SampleSpec(3, 6, cfg, 0, "euler", (0, 1, 2))
    counts: list[ComputeCount] = []
    by = Scheduled(table_of_third(spec.way), slopes=0.1 * random(6, 4, 2), counted=counts.append)
    together = sample_batch(model, spec, range(3), scheduled=by)
    alone = torch.cat([sample_batch(model, spec, [i], scheduled=by) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert counts[0].total == pytest.approx(3 * spec.way.operations(model.config) / 3)
    state, output = 4 * 8 * 8 * 4, 8 * 8 * 8 * 4  # bytes of an image: fp32, four channels, and four more of variance
    assert counts[0].most_kept == 3 * 2 * (state + output)


def test_blocks_reuse_what_they_computed_when_the_model_was_asked(pico: Callable[..., Pico]) -> None:
    """Evaluations: asked, followed, reused. What the first computed is kept over the second."""
    model, way, labels = pico(sampler="rf").model(), ScheduledSampling("euler", 3), torch.tensor([0, 1])
    choices, xs = ("full", "follow", "reuse"), random(3, 2, 4, 8, 8)

    def predicted(evaluations: list[int], slopes: torch.Tensor | None) -> list[torch.Tensor]:
        short = ScheduledSampling("euler", len(evaluations))
        by = Scheduled(by_evaluation(short, lambda k: choices[evaluations[k]]), slopes=slopes)
        times = [way.times[k] for k in evaluations]
        with torch.inference_mode():
            predict = scheduled_predictor(model, labels, way.guidance, times, by)
            return [predict(xs[k], way.times[k]) for k in evaluations]

    first, held, reused = predicted([0, 1, 2], torch.zeros(3, 4, 2))
    assert torch.equal(held, first)
    assert torch.equal(reused, predicted([0, 2], None)[1]) and not torch.equal(reused, first)


def test_slopes_are_needed_where_predictions_follow() -> None:
    way = ScheduledSampling("euler", 4)
    with pytest.raises(ValueError, match="without slopes"):
        FollowedPredictions(every_second(way, saved="follow"), None)
    kept = FollowedPredictions(every_second(way), None)
    x = random(1, C, 5, 5)
    assert not any(kept.at(k) for k in range(4)) and kept.kept(0, x, x) is x and kept.nbytes == 0
