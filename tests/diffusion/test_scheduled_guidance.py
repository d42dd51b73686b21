"""Guided predictions by a schedule: those without one where all is computed, the null class reused or off by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Pico, make_pico
from schedules import all_full, by_evaluation, every_second, statistics_for
from torch import Tensor

from ditmoe_cli.diffusion.compute_schedule import CONSTANT, ENERGY, SCALE, ScheduledSampling
from ditmoe_cli.diffusion.guidance import away_from_weak, combine
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.schedule import SOLVERS, Interval
from ditmoe_cli.diffusion.scheduled_guidance import Scheduled, scheduled_predictor, statistics_of
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.diffusion.weak_models import weak_model
from ditmoe_cli.model.block_choices import ComputeTable, full_table
from ditmoe_cli.model.dit import Denoiser, DiTMoE
from ditmoe_cli.model.scheduled import ComputeCount

WAYS: tuple[tuple[str, float, Interval], ...] = (
    ("euler", 1.0, (0.0, 1.0)),
    ("euler", 1.5, (0.3, 0.8)),
    ("heun", 1.5, (0.3, 1.0)),
    ("ab3", 4.0, (0.0, 1.0)),
    ("dpmpp-2m", 1.5, (0.0, 0.6)),
    ("ddim", 1.5, (0.0, 1.0)),
    ("ddpm", 1.0, (0.0, 1.0)),
    ("ddpm-dpmpp-2m", 1.5, (0.2, 1.0)),
)
GUIDE = Guide("top1", 0.5, (0.2, 1.0))
LABELS = torch.tensor([0, 2, 1])


def spec_of(solver: Any, cfg: float, interval: Interval, guide: Guide | None, images: int = 3) -> SampleSpec:
    return SampleSpec(images, 4, cfg, 3, solver, (0, 1, 2), interval, guide=guide)


def weak_of(model: DiTMoE, guide: Guide | None) -> Denoiser | None:
    return weak_model(model, guide, lambda: model)


# everything computed


@pytest.mark.parametrize(
    ("solver", "cfg", "interval", "guide"), [(*way, (None, GUIDE)[i % 2]) for i, way in enumerate(WAYS)]
)
def test_with_everything_computed_images_are_those_without_a_schedule(
    pico: Callable[..., Pico], solver: str, cfg: float, interval: Interval, guide: Guide | None
) -> None:
    model = pico(sampler=SOLVERS[solver].family).model()  # type: ignore[index]
    spec = spec_of(solver, cfg, interval, guide)
    weak = weak_of(model, guide)
    counts: list[ComputeCount] = []
    by = Scheduled(all_full(spec.way), counted=counts.append)
    plain = sample_batch(model, spec, range(3), weak=weak)
    assert torch.equal(sample_batch(model, spec, range(3), weak=weak, scheduled=by), plain)
    assert [count.total for count in counts] == [3 * spec.way.operations(model.config)]
    assert counts[0].most_kept == 0


@pytest.mark.parametrize("choice", ["top-p:1.0", "saliency:0.0", "odp:0.0"])
@pytest.mark.parametrize("attention", ["timm", "flash"])
def test_thresholds_that_leave_nothing_out_change_nothing(
    pico: Callable[..., Pico], attention: str, choice: str
) -> None:
    model = pico(sampler="rf", attention=attention).model()
    spec = spec_of("ab2", 1.5, (0.0, 1.0), None)
    arrays = {name: torch.tensor(array) for name, array in statistics_for(model.config).items()}
    by = Scheduled(by_evaluation(spec.way, lambda _: choice), statistics_of(arrays, 4, 1))
    assert torch.equal(sample_batch(model, spec, range(3), scheduled=by), sample_batch(model, spec, range(3)))


def test_a_residual_of_0_computes_everything(pico: Callable[..., Pico]) -> None:
    model = pico(sampler="rf").model()
    spec = spec_of("euler", 1.5, (0.0, 1.0), None)
    table = full_table(4, 2, spec.way.null, residual=0.0)
    found = sample_batch(model, spec, range(3), scheduled=Scheduled(table))
    assert torch.equal(found, sample_batch(model, spec, range(3)))


# the null class


def asked(
    model: DiTMoE, way: ScheduledSampling, table: ComputeTable, xs: list[Tensor], weak: Denoiser | None = None
) -> list[Tensor]:
    """What a schedule predicts for given inputs, whatever it predicted before."""
    with torch.inference_mode():
        predict = scheduled_predictor(model, LABELS, way.guidance, way.times, Scheduled(table), weak)
        return [predict(x, t) for x, t in zip(xs, way.times, strict=True)]


@pytest.mark.parametrize("guide", [None, Guide("top1", 0.5)], ids=["plain", "weak"])
@pytest.mark.parametrize("solver", ["euler", "ddim"])
def test_a_null_class_that_is_reused_or_off_is_by_hand(
    pico: Callable[..., Pico], solver: Any, guide: Guide | None
) -> None:
    """Evaluations: predicted, reused, off, reused, predicted, reused."""
    family = SOLVERS[solver].family  # type: ignore[index]
    model = pico(sampler=family).model()
    way = ScheduledSampling(solver, 6, cfg=2.5, guide=guide)
    table = by_evaluation(way, lambda _: "full", null=("compute", "reuse", "off", "reuse", "compute", "reuse"))
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(3, 4, 8, 8, generator=generator) for _ in way.times]
    weak = weak_of(model, guide)
    found = asked(model, way, table, xs, weak)
    null, source = torch.full_like(LABELS, model.config.num_classes), 0
    with torch.inference_mode():
        branches = [
            [model(x, torch.full((3,), float(t)), labels) for labels in (LABELS, null)]
            for x, t in zip(xs, way.times, strict=True)
        ]
        for evaluation, choice in enumerate(table.null):
            cond, uncond = branches[evaluation]
            source = evaluation if choice == "compute" else source
            if choice == "reuse":
                uncond = cond - (branches[source][0] - branches[source][1])
            expected = cond if choice == "off" else combine(cond, uncond, 2.5, family)
            if weak is not None:
                t = way.times[evaluation]
                other = weak.prepared([t], LABELS)(xs[evaluation], t)
                expected = away_from_weak(expected, cond, other, 0.5, family)
            torch.testing.assert_close(found[evaluation], expected, rtol=1e-4, atol=1e-4)


def test_blocks_of_the_null_class_are_reused_where_it_was_predicted(pico: Callable[..., Pico]) -> None:
    """Its blocks reuse what they made when it was predicted last, two evaluations ago."""
    model = pico(sampler="rf").model()
    way = ScheduledSampling("euler", 3, cfg=2.0)
    table = by_evaluation(way, lambda e: "reuse" if e == 2 else "full", null=("compute", "off", "compute"))
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    off = asked(model, way, table, [x, x, x])
    whole = asked(model, way, by_evaluation(way, lambda e: "reuse" if e == 2 else "full"), [x, x, x])
    torch.testing.assert_close(off[0], whole[0])
    assert not torch.allclose(off[1], whole[1], atol=1e-3)
    assert not torch.allclose(off[2], whole[2], atol=1e-5)  # the branch's own outputs are of another time


# batches


@pytest.mark.parametrize(
    ("solver", "choice"),
    [
        *(("euler", choice) for choice in ("reuse", "reuse-slots", "regressed")),
        *(("heun", choice) for choice in ("forecast", "top1")),
        *(("ddim", choice) for choice in ("reuse-mixture", "odp:0.7")),
    ],
)
def test_batch_size_does_not_change_an_image(pico: Callable[..., Pico], solver: Any, choice: str) -> None:
    model = pico(sampler=SOLVERS[solver].family).model()  # type: ignore[index]
    spec = spec_of(solver, 1.5, (0.0, 1.0), None, images=5)
    arrays = {name: torch.tensor(array) for name, array in statistics_for(model.config).items()}
    by = Scheduled(every_second(spec.way, saved=choice), statistics_of(arrays, len(spec.way.times), 1))
    whole = sample_batch(model, spec, range(5), scheduled=by)
    for part in ([0], [4, 1], [2, 3, 0]):
        found = sample_batch(model, spec, part, scheduled=by)
        torch.testing.assert_close(found, whole[part], rtol=1e-4, atol=1e-4)
    assert torch.equal(sample_batch(model, spec, range(5), scheduled=by), whole)
    assert not torch.allclose(whole, sample_batch(model, spec, range(5)), atol=1e-3)


def test_by_residuals_each_image_decides_for_itself(pico: Callable[..., Pico]) -> None:
    model = pico(sampler="rf").model()
    spec = spec_of("euler", 1.5, (0.0, 1.0), None, images=5)
    found = {}
    for threshold in (0.3, 0.5, 100.0):
        counts: list[ComputeCount] = []
        by = Scheduled(full_table(4, 2, spec.way.null, threshold), counted=counts.append)
        whole = sample_batch(model, spec, range(5), scheduled=by)
        found[threshold] = counts[0].total
        for part in ([0], [4, 1]):
            parts = sample_batch(model, spec, part, scheduled=by)
            torch.testing.assert_close(parts, whole[part], rtol=1e-4, atol=1e-4)
        single = sum(_total(model, spec, image, by) for image in range(5))
        assert counts[0].total == pytest.approx(single)
    assert found[100.0] < 5 * spec.way.operations(model.config)
    assert found[0.3] >= found[0.5] >= found[100.0]


def _total(model: DiTMoE, spec: SampleSpec, image: int, by: Scheduled) -> float:
    counts: list[ComputeCount] = []
    sample_batch(model, spec, [image], scheduled=replace(by, counted=counts.append))
    return counts[0].total


# what is known by step, and what cannot be


def test_statistics_are_those_of_the_step_bin_and_the_branch() -> None:
    arrays = {name: torch.tensor(array) for name, array in statistics_for(make_pico().config, bins=2).items()}
    at = statistics_of(arrays, 5, 2)
    for evaluation, branch, block in ((0, 0, 0), (2, 1, 1), (4, 1, 0)):
        known = at(evaluation, branch, block)
        assert known.energy is not None and known.scale is not None and known.constant is not None
        assert torch.equal(known.energy, arrays[ENERGY][evaluation * 2 // 5, branch, block])
        assert torch.equal(known.scale, arrays[SCALE][block]) and torch.equal(known.constant, arrays[CONSTANT][block])
        assert at(evaluation, branch, block) is known
    assert statistics_of({}, 5, 2)(0, 0, 0).energy is None


def test_a_table_is_for_one_number_of_evaluations(pico: Callable[..., Pico]) -> None:
    model = pico(sampler="rf").model()
    way = ScheduledSampling("euler", 3)
    with pytest.raises(ValueError, match="a table of 3 evaluations for 4 times"):
        scheduled_predictor(model, LABELS, way.guidance, [1.0, 0.7, 0.5, 0.2], Scheduled(all_full(way)))
    with torch.inference_mode(), pytest.raises(IndexError, match="the table ends after 3 evaluations"):
        predict = scheduled_predictor(model, LABELS, way.guidance, way.times, Scheduled(all_full(way)))
        for t in (*way.times, way.times[0]):
            predict(torch.zeros(3, 4, 8, 8), t)


def test_nobody_watches_a_schedule(pico: Callable[..., Pico]) -> None:
    model = pico(sampler="rf").model()
    spec = spec_of("euler", 1.0, (0.0, 1.0), None)
    with pytest.raises(TypeError, match="which nobody watches"):
        sample_batch(
            model, spec, range(3), Watchers(on_step=lambda _x, _t: None), scheduled=Scheduled(all_full(spec.way))
        )
