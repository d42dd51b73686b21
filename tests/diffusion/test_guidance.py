"""Guidance: the algebra of both families, and what the network is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditmoe_cli.diffusion.guidance import away_from_weak, combine, guided_predictor
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.diffusion.weak_guidance import Guidance, Guide
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.moe import MoEEvent

SCALES = st.floats(0, 20)
FAMILIES = st.sampled_from(["rf", "ddpm"])


def branches(channels: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, channels, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))


@given(scale=SCALES, family=FAMILIES, channels=st.sampled_from([3, 4, 6, 8]))
def test_guidance_is_affine_in_the_scale(scale: float, family: Sampler, channels: int) -> None:
    cond, uncond = branches(channels)
    found = combine(cond, uncond, scale, family)
    guided = channels if family == "rf" else 3
    torch.testing.assert_close(found[:, :guided], (uncond + scale * (cond - uncond))[:, :guided])
    assert torch.equal(found[:, guided:], cond[:, guided:])
    torch.testing.assert_close(combine(cond, uncond, 1.0, family), cond)
    torch.testing.assert_close(combine(cond, uncond, 0.0, family)[:, :guided], uncond[:, :guided])
    torch.testing.assert_close(combine(cond, cond, scale, family), cond)


@pytest.mark.parametrize("family", ["rf", "ddpm"])
@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_the_predictor_combines_both_branches(pico: Callable[..., Pico], family: Sampler, scale: float) -> None:
    model = pico(sampler=family).model()
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([0, 2, 1])
    times, null = torch.full((3,), 0.4), torch.full((3,), 3)
    found = guided_predictor(model, labels, Guidance(family, scale))(x, 0.4)
    expected = combine(model(x, times, labels), model(x, times, null), scale, family)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Recorder:
    """Stands in for a network and notes what it is asked."""

    def __init__(self, config: Any, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.calls, self.dtype = config, [], dtype

    def prepared(self, times: Sequence[float], labels: Tensor) -> Callable[..., Tensor]:
        def predict(x: Tensor, t: float, observer: object = None) -> Tensor:
            assert t in times
            self.calls.append((x, t, labels, observer))
            return torch.cat((x, x), dim=1).to(self.dtype)

        return predict


def test_scale_one_costs_one_evaluation_and_others_one_doubled(pico: Callable[..., Pico]) -> None:
    config, x, labels = pico().config, torch.randn(2, 4, 8, 8), torch.tensor([2, 0])
    plain, doubled = Recorder(config), Recorder(config)
    guided_predictor(plain, labels, Guidance("rf"))(x, 0.25)  # type: ignore[arg-type]
    guided_predictor(doubled, labels, Guidance("rf", 2.0))(x, 0.25)  # type: ignore[arg-type]
    ((x1, t1, y1, _),), ((x2, t2, y2, _),) = plain.calls, doubled.calls
    assert torch.equal(x1, x)
    assert t1 == t2 == 0.25
    assert y1.tolist() == [2, 0]
    assert torch.equal(x2, torch.cat((x, x)))
    assert y2.tolist() == [2, 0, 3, 3], "conditional first, then the null class"


def test_predictions_are_fp32_whatever_the_model_computes_in(pico: Callable[..., Pico]) -> None:
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 1])
    for scale in (1.0, 3.0):
        half = Recorder(pico().config, torch.bfloat16)
        assert guided_predictor(half, labels, Guidance("ddpm", scale))(x, 5).dtype == torch.float32  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_watchers_see_every_block_and_step(pico: Callable[..., Pico], scale: float) -> None:
    model, seen, steps = pico().model(), [], []
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 1])

    def observer(event: MoEEvent) -> None:
        seen.append((len(steps), event.block, len(event.gamma)))

    watchers = Watchers(observer, lambda x, t: steps.append((x, t)))
    predict = guided_predictor(model, labels, Guidance("ddpm", scale), watchers)
    predict(x, 7)
    predict(x + 1, 3)
    images = 2 if scale == 1.0 else 4
    assert seen == [(1, 0, images), (1, 1, images), (2, 0, images), (2, 1, images)]
    assert [t for _, t in steps] == [7, 3]
    assert torch.equal(steps[1][0], x + 1)


# guidance by a weaker model

WEAK = Guide("f" * 64, 0.7)


def asked(model: DiTMoE, x: Tensor, t: float, labels: list[int]) -> Tensor:
    out: Tensor = model(x, torch.full((len(x),), t), torch.tensor(labels))
    return out


@given(scale=st.floats(0, 8), family=FAMILIES, channels=st.sampled_from([3, 4, 8]))
def test_the_weaker_model_is_affine_in_its_scale(scale: float, family: Sampler, channels: int) -> None:
    (cond, uncond), (weak, _) = branches(channels), branches(channels)
    weak = weak.flip(0)
    output = combine(cond, uncond, 1.5, family)
    found = away_from_weak(output, cond, weak, scale, family)
    guided = channels if family == "rf" else 3
    torch.testing.assert_close(found[:, :guided], (output + scale * (cond - weak))[:, :guided])
    assert torch.equal(found[:, guided:], cond[:, guided:])
    assert torch.equal(away_from_weak(output, cond, cond, scale, family), output)
    assert torch.equal(away_from_weak(output, cond, weak, 0.0, family), output)


@pytest.mark.parametrize("family", ["rf", "ddpm"])
@pytest.mark.parametrize("cfg", [1.0, 1.5])
def test_the_predictor_adds_the_difference_of_two_predictions(
    pico: Callable[..., Pico], family: Sampler, cfg: float
) -> None:
    model, weak = pico(sampler=family).model(), pico(sampler=family, seed=1, depth=1, hidden=16).model()
    x, labels, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), [0, 2, 1], 0.4
    guidance = Guidance(family, cfg, guide=WEAK)
    found = guided_predictor(model, torch.tensor(labels), guidance, weak=weak)(x, t)
    cond, worse = asked(model, x, t, labels), asked(weak, x, t, labels)
    expected = combine(cond, asked(model, x, t, [3, 3, 3]), cfg, family) if cfg != 1.0 else cond.clone()
    guided = cond.shape[1] if family == "rf" else 3
    expected[:, :guided] += 0.7 * (cond - worse)[:, :guided]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_conditional_branch_is_computed_once_and_the_weaker_one_unobserved(pico: Callable[..., Pico]) -> None:
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([2, 0])
    strong, weak = Recorder(pico().config), Recorder(pico().config)
    times = [0.9, 0.5, 0.1]
    guidance = Guidance("rf", 2.0, (0.4, 1.0), Guide("f" * 64, 0.5, (0.0, 0.6)))
    watchers = Watchers(observer=lambda _: None)
    predict = guided_predictor(strong, labels, guidance, watchers, times, weak)  # type: ignore[arg-type]
    for t in times:
        predict(x, t)
    assert [(len(images), t) for images, t, _, _ in strong.calls] == [(4, 0.9), (4, 0.5), (2, 0.1)]
    assert [(len(images), t, y.tolist(), observer) for images, t, y, observer in weak.calls] == [
        (2, 0.5, [2, 0], None),
        (2, 0.1, [2, 0], None),
    ]
    assert all(observer is watchers.observer for *_, observer in strong.calls)
    evaluated = sum(len(images) // 2 for images, *_ in (*strong.calls, *weak.calls))
    assert evaluated == sum(guidance.evaluations(t) for t in times) == 7


def test_a_scale_of_zero_is_the_unguided_prediction_to_the_bit(pico: Callable[..., Pico]) -> None:
    model, labels, x = pico().model(), torch.tensor([1, 2]), torch.randn(2, 4, 8, 8)
    for cfg in (1.0, 1.5):
        plain = guided_predictor(model, labels, Guidance("ddpm", cfg))(x, 7)
        nothing = guided_predictor(model, labels, Guidance("ddpm", cfg, guide=Guide("top1", 0.0)))(x, 7)
        assert torch.equal(plain, nothing)


def test_a_guide_without_its_model_is_a_mistake(pico: Callable[..., Pico]) -> None:
    with pytest.raises(ValueError, match="guided by top1, whose model is not given"):
        guided_predictor(pico().model(), torch.tensor([0]), Guidance("ddpm", guide=Guide("top1", 0.5)))
