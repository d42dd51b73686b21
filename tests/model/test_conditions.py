"""Conditions and modulations of a run are those of each evaluation, computed once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Pico

from ditmoe_cli.model import conditions as module
from ditmoe_cli.model.conditions import conditions, modulation_bytes


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("sampler", ["ddpm", "rf"])
def test_a_prepared_model_predicts_as_the_model_does(
    pico: Callable[..., Pico], sampler: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico(sampler=sampler).model()
    if not whole:
        monkeypatch.setattr(module, "MOST_BYTES", 0)
    times = [999.0, 500.0, 1.0] if sampler == "ddpm" else [1.0, 0.5, 0.1]
    x, labels = torch.randn(4, 4, 8, 8), torch.tensor([2, 0, 3, 0])
    prepared = model.prepared(times, labels)
    for t in (*times, times[0]):
        torch.testing.assert_close(prepared(x, t), model(x, torch.full((4,), t), labels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keeps", [True, False])
def test_each_pair_is_modulated_once(pico: Callable[..., Pico], keeps: bool) -> None:
    model, labels = pico().model(), torch.tensor([2, 0, 2, 2])
    run, asked = conditions([5.0, 3.0, 5.0], labels, model.condition, model.config, keeps), []

    def modulate(c: torch.Tensor) -> torch.Tensor:
        asked.append(len(c))
        return c[:, :2]

    for t in (5.0, 3.0, 5.0):
        for name in ("a", "b"):
            found = run.at(name, modulate, t)
            torch.testing.assert_close(found, model.condition(torch.full((4,), t), labels)[:, :2])
    assert asked == [4] * (2 if keeps else 6), "two times of two classes"


def test_kept_and_computed_anew_are_equal_to_the_bit(pico: Callable[..., Pico]) -> None:
    model, labels = pico().model(), torch.tensor([2, 0, 1])
    runs = [conditions([5.0, 3.0], labels, model.condition, model.config, keeps) for keeps in (True, False)]
    for t in (3.0, 5.0):
        first, second = (run.at("block", model.blocks[0].adaLN_modulation, t) for run in runs)
        assert torch.equal(first, second)


def test_modulations_are_counted_from_shapes(pico: Callable[..., Pico]) -> None:
    config = pico().config
    row = pico().model().blocks[0].adaLN_modulation(torch.zeros(1, config.hidden_size))
    assert modulation_bytes(config, 7) == 7 * config.depth * row.nbytes


@pytest.mark.parametrize("whole", [True, False])
def test_pairs_are_embedded_when_they_are_asked_for(
    pico: Callable[..., Pico], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where modulations are not kept, no table of all times is held either."""
    if not whole:
        monkeypatch.setattr(module, "MOST_BYTES", 0)
    model, asked = pico().model(), list[int]()

    def embed(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        asked.append(len(t))
        return model.condition(t, y)

    run = conditions([5.0, 3.0, 1.0], torch.tensor([2, 0]), embed, model.config)
    for t in (5.0, 3.0, 1.0):
        for block in model.blocks:
            run.at(str(id(block)), block.adaLN_modulation, t)
    assert asked == ([6] if whole else [2, 2, 2])


def test_conditions_of_a_model_in_fp64_are_fp64(pico: Callable[..., Pico]) -> None:
    model, labels = pico().model().double(), torch.tensor([2, 0])
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(model.prepared([5.0], labels)(x, 5.0), model(x, torch.full((2,), 5.0), labels))
