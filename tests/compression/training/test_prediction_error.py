"""Errors of guided predictions: of states, by step bin, and the weights of bins."""

from __future__ import annotations

import pytest
import torch
from conftest import make_pico

from ditmoe_cli.compression.training.error_bins import BINS
from ditmoe_cli.compression.training.fitting_batches import FittingBatches
from ditmoe_cli.compression.training.prediction_error import (
    JudgedErrors,
    bin_weights,
    bins_of,
    by_bin,
    judged_errors,
    state_errors,
)
from ditmoe_cli.compression.training.teacher_states import NoisedImages, Noising, kept_states


def test_bins_are_even_parts_of_the_times_from_noise_to_image() -> None:
    assert bins_of(torch.tensor([1.0, 0.95, 0.89, 0.5, 0.1001, 0.0999, 1e-6]), "rf").tolist() == [0, 0, 1, 5, 8, 9, 9]
    assert bins_of(torch.tensor([999.0, 900.0, 899.0, 499.0, 99.0, 0.0]), "ddpm").tolist() == [0, 0, 1, 5, 9, 9]
    every = bins_of(torch.arange(1000).float(), "ddpm")
    assert torch.bincount(every, minlength=BINS).tolist() == [100] * BINS


def test_sums_by_bin_and_the_relative_errors_of_all() -> None:
    bins = torch.tensor([0, 0, 3, 9])
    judged = by_bin(torch.tensor([1.0, 2.0, 3.0, 0.5]), torch.tensor([10.0, 20.0, 30.0, 1.0]), bins)
    assert judged.counts == (2, 0, 0, 1, 0, 0, 0, 0, 0, 1)
    assert judged.error == pytest.approx(6.5 / 61)
    assert judged.by_bin == pytest.approx((0.1, 0, 0, 0.1, 0, 0, 0, 0, 0, 0.5))


@pytest.mark.parametrize(("sampler", "cfg"), [("rf", 1.0), ("rf", 2.0), ("ddpm", 1.0), ("ddpm", 1.5)])
def test_a_model_has_no_error_to_itself_and_another_one_has(sampler: str, cfg: float) -> None:
    pico, other = make_pico(sampler=sampler), make_pico(sampler=sampler, seed=1)
    images = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    noising = Noising(images, torch.arange(6) % 3, pico.config.sampler, 0)
    states = kept_states(NoisedImages(pico.model(), noising, cfg), 12, FittingBatches(5))
    own, others = (judged_errors(each.model(), states, FittingBatches(7)) for each in (pico, other))
    assert own.error < 1e-11 and others.error > 0.1
    assert sum(others.counts) == 12
    per_state = state_errors(other.model(), states)
    assert per_state.shape == (12,) and float(per_state.sum()) == pytest.approx(sum(others.errors), rel=1e-5)
    halves = [state_errors(other.model(), states.at(rows)) for rows in (torch.arange(5), torch.arange(5, 12))]
    torch.testing.assert_close(torch.cat(halves), per_state)


def judged(errors: dict[int, float], counts: dict[int, int]) -> JudgedErrors:
    sums = tuple(errors.get(b, 0.0) for b in range(BINS))
    return JudgedErrors(sums, (1.0,) * BINS, tuple(counts.get(b, 0) for b in range(BINS)))


def test_bins_weigh_by_a_power_of_the_mean_error_of_their_states() -> None:
    seen = judged({0: 8.0, 1: 1.0, 2: 0.5}, {0: 2, 1: 1, 2: 2})
    assert bin_weights(seen, 0.0).tolist() == pytest.approx([1.0] * BINS)
    for strength in (0.5, 1.0):
        weights = bin_weights(seen, strength)
        assert float(weights.mean()) == pytest.approx(1.0)
        assert float(weights[1] / weights[0]) == pytest.approx(4.0**strength)
        assert float(weights[2] / weights[0]) == pytest.approx(16.0**strength)
        assert weights[3:].tolist() == pytest.approx([float(weights[:3].mean())] * 7), "bins without states"


def test_a_bin_without_an_error_does_not_outweigh_all_others() -> None:
    weights = bin_weights(judged({0: 1.0, 1: 0.0}, {0: 1, 1: 1}), 0.5)
    assert torch.isfinite(weights).all() and float(weights[1] / weights[0]) == pytest.approx(2000**0.5, rel=1e-3)
    assert torch.isfinite(bin_weights(judged({}, {0: 3}), 1.0)).all(), "where there is no error at all"
