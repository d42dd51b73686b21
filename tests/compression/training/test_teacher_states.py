"""States to train on: images noised anew, the teacher's paths, and what it predicts there."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import make_pico
from torch import Tensor

from ditmoe_cli.compression.training.fitting_batches import FittingBatches
from ditmoe_cli.compression.training.teacher_states import (
    NoisedImages,
    Noising,
    guided_prediction,
    kept_states,
    sampled_images,
    spread,
    target_channels,
)
from ditmoe_cli.diffusion.forward_process import respaced_schedule
from ditmoe_cli.diffusion.guidance import guided_predictor
from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.weak_guidance import Guidance
from ditmoe_cli.model.config import Sampler

FAMILIES: tuple[Sampler, ...] = ("rf", "ddpm")


def images(count: int = 6, channels: int = 4) -> Tensor:
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def noising(count: int = 6, family: Sampler = "rf", **more: Any) -> Noising:
    return Noising(images(count), torch.arange(count) % 3, family, **{"seed": 0, **more})


# predictions


@pytest.mark.parametrize(("family", "learns_sigma", "channels"), [("rf", True, 4), ("rf", False, 4), ("ddpm", True, 8)])
def test_the_second_half_of_a_rectified_flow_is_no_target(family: Sampler, learns_sigma: bool, channels: int) -> None:
    pico = make_pico(sampler=family, learn_sigma=learns_sigma)
    assert target_channels(pico.config) == channels
    z, t, y = images(2), torch.tensor([0.5, 1.0]), torch.tensor([0, 2])
    for cfg in (1.0, 1.5):
        assert guided_prediction(pico.model(), z, t, y, cfg).shape == (2, channels, 8, 8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cfg", [1.0, 1.5, 0.0])
def test_guided_predictions_are_those_that_samplers_step_by(family: Sampler, cfg: float) -> None:
    pico = make_pico(sampler=family)
    z, y = images(3), torch.tensor([0, 2, 1])
    for t in (0.3, 0.9) if family == "rf" else (7.0, 998.0):
        expected = guided_predictor(pico.model(), y, Guidance(family, cfg))(z, t)
        found = guided_prediction(pico.model(), z, torch.full((3,), t), y, cfg)
        torch.testing.assert_close(found, expected[:, : target_channels(pico.config)])


# noised images


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_images_noised_by_the_forward_process(family: Sampler) -> None:
    """States by hand: z = (1 - t) x + t ε, or √ᾱ x + √(1 - ᾱ) ε."""
    given, rows = noising(family=family, seed=5, purpose="a test"), torch.tensor([0, 7, 30])
    z, t, labels = given.at(rows)
    noise = image_noise(5, rows.tolist(), torch.device("cpu"), "a test").draw((4, 8, 8))
    clean = given.images[[0, 1, 0]]
    assert labels.tolist() == [0, 1, 0]
    kept = 1 - t.double() if family == "rf" else respaced_schedule(list(range(1000))).alphas_bar[t.long()].sqrt()
    other = t.double() if family == "rf" else (1 - kept.square()).sqrt()
    expected = kept.reshape(-1, 1, 1, 1) * clean + other.reshape(-1, 1, 1, 1) * noise
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 123456789])
def test_times_cover_all_evenly_also_those_of_few_states(seed: int) -> None:
    for first, count in ((0, 20), (1000, 20), (5, 1000)):
        numbers, one = torch.arange(first, first + count), torch.full((count,), 3)
        for places in (spread(numbers, one, seed).sort().values, spread(one, numbers, seed).sort().values):
            assert float(places.min()) >= 0 and float(places.max()) < 1
            assert float((places[1:] - places[:-1]).max()) < 3.5 / count, "no gap is wide"
    t = noising(seed=seed).at(torch.arange(1000))[1]
    assert 0 < float(t.min()) < 0.01 and 0.99 < float(t.max()) <= 1
    steps = noising(family="ddpm", seed=seed).at(torch.arange(4000))[1]
    assert torch.equal(steps, steps.round()) and len(steps.unique()) > 900
    assert float(steps.min()) < 4 and float(steps.max()) > 995


@pytest.mark.parametrize(("family", "times"), [("rf", (1.0, 0.75, 0.5, 0.25)), ("ddpm", (999.0, 749.0, 499.0, 249.0))])
def test_a_model_of_few_steps_is_asked_at_their_times_alone(family: Sampler, times: tuple[float, ...]) -> None:
    given = noising(family=family, times=times, purpose="a test")
    z, t, _ = given.at(torch.arange(400))
    counts = Counter(t.tolist())
    assert counts.keys() == set(times) and max(counts.values()) - min(counts.values()) < 8
    assert all(len(given.at(image + 6 * torch.arange(20))[1].unique()) == 4 for image in range(6)), "each image at all"
    noise = image_noise(0, [7], torch.device("cpu"), "a test").draw((4, 8, 8))
    if family == "rf":
        torch.testing.assert_close(z[7:8], (1 - t[7]) * given.images[1:2] + t[7] * noise)
    else:
        kept = float(respaced_schedule([int(t[7])]).alphas_bar[0])
        torch.testing.assert_close(z[7:8], kept**0.5 * given.images[1:2] + (1 - kept) ** 0.5 * noise)


@pytest.mark.parametrize("images", [10, 34, 55, 64])
def test_each_image_is_seen_at_all_times_and_with_both_labels(images: int) -> None:
    """Whatever the number of images: a Fibonacci number, or a multiple of ten."""
    given = noising(images, null=3)
    for image in range(0, images, 7):
        t, labels = given.at(image + images * torch.arange(100))[1:]
        assert torch.histc(t, 10, 0, 1).min() >= 5
        assert int((labels == 3).sum()) == 10


def test_states_are_functions_of_seed_purpose_and_number() -> None:
    rows = torch.tensor([3, 11, 4])
    first = noising().at(rows)
    assert all(torch.equal(a, b) for a, b in zip(first, noising().at(rows), strict=True))
    assert torch.equal(noising().at(rows[1:2])[0], first[0][1:2]), "not of the others that are asked for"
    for other in (noising(seed=1), noising(purpose="judging")):
        assert not torch.equal(other.at(rows)[0], first[0])
    assert not torch.equal(noising(seed=1).at(rows)[1], first[1])


def test_every_tenth_state_is_of_the_null_class_where_there_is_one_to_train() -> None:
    labels = noising(7, null=3).at(torch.arange(700))[2]
    assert int((labels == 3).sum()) == 70 and Counter(labels.tolist()).keys() == {0, 1, 2, 3}
    assert 3 not in noising(7).at(torch.arange(700))[2]


@pytest.mark.parametrize(("family", "cfg"), [("rf", 1.0), ("rf", 2.0), ("ddpm", 1.5)])
def test_the_teacher_is_asked_about_its_states(family: Sampler, cfg: float) -> None:
    model = make_pico(sampler=family).model()
    source, rows = NoisedImages(model, noising(family=family), cfg), torch.tensor([9, 2])
    states = source.at(rows)
    z, t, labels = source.noising.at(rows)
    assert len(source) > len(source.noising.images) and len(states) == 2 and states.cfg == cfg
    for found, expected in ((states.z, z), (states.t, t), (states.labels, labels)):
        assert torch.equal(found, expected)
    torch.testing.assert_close(states.targets, guided_prediction(model, z, t, labels, cfg))
    assert not states.targets.requires_grad
    kept = kept_states(source, 10, FittingBatches(4))
    assert len(kept) == 10
    torch.testing.assert_close(kept.at(rows).targets, states.targets)


# the teacher's images


@pytest.mark.parametrize(("family", "cfg"), [("rf", 1.0), ("ddpm", 1.5)])
def test_images_are_those_that_are_sampled(family: Sampler, cfg: float) -> None:
    model = make_pico(sampler=family).model()
    spec = SampleSpec(5, 3, cfg, 7, "euler" if family == "rf" else "ddim", (0, 2))
    found = sampled_images(model, spec, FittingBatches(2), "a test")
    torch.testing.assert_close(found, sample_batch(model, spec, range(5), purpose="a test").float())
    other = sampled_images(model, spec, FittingBatches(2), "another")
    assert not torch.equal(found, other), "each purpose has noise of its own"
