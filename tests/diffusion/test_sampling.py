"""The sampling loop: reproducible per image, labels balanced, nonsense refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from conftest import Pico, make_pico
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditmoe_cli.diffusion.forward_process import sampling_schedule
from ditmoe_cli.diffusion.guidance import guided_predictor
from ditmoe_cli.diffusion.sampling import (
    SampleSpec,
    batches,
    check_followable,
    check_spec,
    sample_batch,
    sampling_times,
    visit_noised,
)
from ditmoe_cli.diffusion.schedule import SOLVERS, Solver
from ditmoe_cli.diffusion.step_bins import choose_bins, step_bin, steps_of_bins
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.diffusion.weak_guidance import Guidance, Guide
from ditmoe_cli.diffusion.weak_models import weak_model
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.model.dit import Denoiser, DiTMoE, Prediction
from ditmoe_cli.model.moe import Observer

SPEC = SampleSpec(images=7, steps=4, cfg=1.5, seed=3, solver="euler", classes=(0, 1, 2))
CONFIG = make_pico(sampler="rf", depth=1).config  # of three classes
NAN, INF = float("nan"), float("inf")


def sample_all(model: object, spec: SampleSpec, batch: int) -> Tensor:
    return torch.cat([sample_batch(model, spec, part) for part in batches(spec.images, batch)])  # type: ignore[arg-type]


@pytest.mark.parametrize(("solver", "cfg"), [(solver, (1.0, 1.5)[i % 2]) for i, solver in enumerate(SOLVERS)])
def test_batch_size_does_not_change_an_image(pico: Callable[..., Pico], solver: str, cfg: float) -> None:
    model = pico(sampler=SOLVERS[solver].family).model()
    spec = replace(SPEC, solver=solver, cfg=cfg)
    whole = sample_all(model, spec, 7)
    assert whole.shape == (7, 4, 8, 8)
    assert whole.dtype == torch.float32
    for batch in (1, 3):
        difference = (sample_all(model, spec, batch) - whole).abs().max()
        assert difference <= 1e-5 * max(1.0, float(whole.abs().max()))


def test_any_images_in_any_order(pico: Callable[..., Pico]) -> None:
    model = pico(sampler="rf").model()
    whole = sample_all(model, SPEC, 7)
    some = sample_batch(model, SPEC, [6, 0, 3])
    torch.testing.assert_close(some, whole[[6, 0, 3]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_spec_gives_the_same_bytes(pico: Callable[..., Pico], solver: str) -> None:
    model, spec = pico().model(), replace(SPEC, solver=solver)
    first = sample_all(model, spec, 3)
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(sample_all(model, spec, 3), first)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"steps": 5},
        {"cfg": 2.0},
        {"classes": (1, 2, 0)},
        {"classes": (0,)},
        {"solver": "ddim"},
        {"interval": (0.4, 1.0)},
    ],
)
def test_all_that_a_spec_says_matters_and_is_in_its_conditions(
    pico: Callable[..., Pico], change: dict[str, object]
) -> None:
    model, other = pico().model(), replace(SPEC, **change)  # type: ignore[arg-type]
    assert not torch.allclose(sample_all(model, SPEC, 7), sample_all(model, other, 7), atol=1e-3)
    assert other.conditions() != SPEC.conditions()
    json.dumps(other.conditions())


def test_purposes_have_their_own_noise(pico: Callable[..., Pico]) -> None:
    model = pico(sampler="rf").model()
    assert not torch.allclose(
        sample_batch(model, SPEC, [0]), sample_batch(model, SPEC, [0], purpose="calibration"), atol=1e-2
    )


@given(images=st.integers(1, 200), classes=st.integers(1, 30))
def test_labels_are_balanced(images: int, classes: int) -> None:
    spec = replace(SPEC, classes=tuple(range(classes)))
    counts = Counter(spec.labels(range(images)))
    assert max(counts.values()) - min([*counts.values()] + [0] * (images < classes)) <= 1
    assert len(counts) == min(images, classes)


@given(images=st.integers(1, 200), batch=st.integers(1, 60))
def test_batches_cover_each_image_once(images: int, batch: int) -> None:
    parts = list(batches(images, batch))
    assert [i for part in parts for i in part] == list(range(images))
    assert all(1 <= len(part) <= batch for part in parts)
    spec = replace(SPEC, classes=(4, 2, 9))
    assert [label for part in parts for label in spec.labels(part)] == spec.labels(range(images))


@pytest.mark.parametrize(
    ("bins", "steps", "chosen"), [(None, 16, 10), (None, 8, 8), (None, 1, 1), (3, 16, 3), (8, 8, 8)]
)
def test_bins_follow_the_steps_unless_they_are_given(bins: int | None, steps: int, chosen: int) -> None:
    assert choose_bins(bins, steps) == chosen


@pytest.mark.parametrize(("bins", "steps"), [(9, 8), (0, 8), (-1, 8)])
def test_given_bins_outside_the_steps_are_refused(bins: int, steps: int) -> None:
    with pytest.raises(UsageError, match=f"bins {bins}: must be between 1 and the {steps} steps"):
        choose_bins(bins, steps)


@pytest.mark.parametrize("batch", [0, -1])
def test_batches_of_nothing_are_refused(batch: int) -> None:
    with pytest.raises(UsageError, match=f"batch {batch}"):
        list(batches(3, batch))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"images": 0}, "images 0"),
        ({"images": -3}, "images -3"),
        ({"steps": 0}, "steps 0"),
        ({"steps": 1001, "solver": "ddim"}, "steps 1001"),
        ({"steps": 1001, "solver": "ddpm"}, "steps 1001"),
        ({"cfg": -0.1}, "cfg"),
        ({"cfg": NAN}, "cfg"),
        ({"cfg": INF}, "cfg"),
        ({"classes": (0, 3)}, "classes 3"),
        ({"classes": (-1,)}, "classes -1"),
        ({"classes": ()}, "classes"),
        ({"interval": (0.5, 0.5)}, "cfg_interval 0.5,0.5"),
        ({"interval": (-0.1, 0.5)}, "cfg_interval"),
        ({"interval": (0.1, 1.5)}, "cfg_interval"),
        ({"interval": (NAN, 1.0)}, "cfg_interval"),
        ({"guide": Guide("top1", NAN)}, "guide_scale"),
        ({"guide": Guide("top1", 0.5, (0.6, 0.5))}, "guide_interval 0.6,0.5"),
    ],
)
def test_specs_out_of_range_are_refused_by_option(change: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        check_spec(replace(SPEC, **change), CONFIG)  # type: ignore[arg-type]


def test_specs_in_range_pass() -> None:
    for change in ({}, {"steps": 1}, {"cfg": 0.0}, {"steps": 1000, "solver": "ddpm"}, {"classes": (2, 2)}):
        spec = replace(SPEC, **change)  # type: ignore[arg-type]
        assert check_spec(spec, CONFIG) is spec


def test_a_model_without_a_null_class_is_not_guided() -> None:
    config = replace(CONFIG, null_class=False)
    unguided = replace(SPEC, cfg=1.0)
    assert check_spec(unguided, config) is unguided
    for scale in (0.0, 1.5, 4.0):
        with pytest.raises(UsageError, match=rf"cfg {scale:g}: .* no null class"):
            check_spec(replace(SPEC, cfg=scale), config)


def test_the_null_class_is_a_label_only_where_it_is_asked_for_and_there_is_one() -> None:
    spec = replace(SPEC, cfg=1.0, classes=(3,))
    assert check_spec(spec, CONFIG, allow_null=True) is spec
    for config, allowed in ((CONFIG, False), (replace(CONFIG, null_class=False), True)):
        with pytest.raises(UsageError, match="classes 0 to 2"):
            check_spec(spec, config, allow_null=allowed)


def test_predictors_refuse_guidance_without_a_null_class(pico: Callable[..., Pico]) -> None:
    model = pico(sampler="rf", null_class=False).model()
    labels = torch.tensor([0, 2])
    plain = guided_predictor(model, labels, Guidance("rf"))(torch.zeros(2, 4, 8, 8), 0.5)
    assert plain.isfinite().all()
    with pytest.raises(UsageError, match="no null class"):
        guided_predictor(model, labels, Guidance("rf", 1.5))


@pytest.mark.parametrize(
    ("change", "nfe"),
    [
        ({"cfg": 1.0}, 4),
        ({"cfg": 1.5}, 8),
        ({"cfg": 0.0}, 8),
        ({"solver": "heun"}, 14),
        ({"solver": "ab4", "interval": (0.3, 0.8)}, 6),
        ({"solver": "heun", "interval": (0.3, 0.8)}, 11),
    ],
)
def test_evaluations_are_what_the_spec_says(pico: Callable[..., Pico], change: dict[str, object], nfe: int) -> None:
    model, rows = pico(depth=1, widths=((8, 8),), sampler="rf").model(), []
    spec = replace(SPEC, **change)  # type: ignore[arg-type]
    sample_batch(model, spec, [0], Watchers(lambda event: rows.append(len(event.gamma))))
    assert sum(rows) == spec.nfe == nfe


GUIDES = (Guide("f" * 64, 0.6), Guide("top1", 0.6), Guide("rank2", 0.6, (0.3, 1.0)))


def weak_of(model: DiTMoE, guide: Guide, pico: Callable[..., Pico]) -> Denoiser:
    """Return the model of a guide; a checkpoint is another one of the same family."""
    found = weak_model(model, guide, pico(sampler=model.config.sampler, seed=1, widths=((8, 8),) * 2).model)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("solver", "cfg", "guide"),
    [("ab2", 1.0, GUIDES[0]), ("heun", 1.5, GUIDES[1]), ("ddim", 1.5, GUIDES[2]), ("ddpm", 1.0, GUIDES[0])],
    ids=str,
)
def test_images_guided_by_a_weaker_model_do_not_depend_on_the_batch(
    pico: Callable[..., Pico], guide: Guide, solver: Solver, cfg: float
) -> None:
    model = pico(sampler=SOLVERS[solver].family).model()
    weak, spec = weak_of(model, guide, pico), replace(SPEC, solver=solver, cfg=cfg, guide=guide)
    whole = sample_batch(model, spec, range(7), weak=weak)
    for part in ([0], [6, 2]):
        torch.testing.assert_close(sample_batch(model, spec, part, weak=weak), whole[part], rtol=1e-4, atol=1e-4)
    assert torch.equal(sample_batch(model, spec, range(7), weak=weak), whole)
    unguided = sample_batch(model, replace(spec, guide=None), range(7))
    assert not torch.allclose(whole, unguided, atol=1e-2)
    assert torch.equal(sample_batch(model, replace(spec, guide=replace(guide, scale=0.0)), range(7)), unguided)


def test_a_copy_of_the_model_as_the_weaker_one_guides_nowhere(pico: Callable[..., Pico]) -> None:
    model, copy = pico(sampler="rf").model(), pico(sampler="rf").model()
    spec = replace(SPEC, guide=Guide("f" * 64, 2.0))
    guided = sample_batch(model, spec, range(7), weak=copy)
    torch.testing.assert_close(guided, sample_batch(model, replace(spec, guide=None), range(7)), rtol=1e-4, atol=1e-4)


def test_evaluations_of_the_weaker_model_count_inside_its_interval(pico: Callable[..., Pico]) -> None:
    model, asked = pico(sampler="rf").model(), []
    guide = Guide("f" * 64, 0.5, (0.3, 0.8))

    class Counted:
        config, device = model.config, model.device

        def prepared(self, times: Sequence[float], labels: Tensor) -> Prediction:
            predict = model.prepared(times, labels)

            def counted(x: Tensor, t: float, observer: Observer | None = None) -> Tensor:
                asked.append(t)
                return predict(x, t, observer)

            return counted

    for cfg, nfe in ((1.0, 6), (1.5, 10)):
        asked.clear()
        spec = replace(SPEC, cfg=cfg, guide=guide)
        sample_batch(model, spec, [0], weak=Counted())
        assert asked == [0.75, 0.5]
        assert (spec.nfe, spec.weak_nfe) == (nfe, 2)


def test_a_guide_is_in_the_conditions_only_where_there_is_one() -> None:
    assert "guide" not in SPEC.conditions() and "guide" not in SPEC.to_json()
    guided = replace(SPEC, guide=Guide("top1", 0.5))
    recorded = {"model": "top1", "scale": 0.5, "interval": [0.0, 1.0]}
    assert guided.conditions() == {**SPEC.conditions(), "guide": recorded}
    assert guided.to_json() == {**SPEC.to_json(), "guide": recorded}


@pytest.mark.parametrize("broken", ["strong", "weak"])
def test_of_two_models_the_one_that_makes_nan_is_named(pico: Callable[..., Pico], broken: str) -> None:
    model, weak = pico(sampler="rf").model(), pico(sampler="rf", seed=1).model()
    (weak if broken == "weak" else model).y_embedder.embedding_table.weight[1] = NAN
    spec = replace(SPEC, cfg=1.0, guide=Guide("f" * 64, 0.5))
    said = (
        r"in the weaker model \(of fingerprint f{12}…\)" if broken == "weak" else "in the guided model, not the weaker"
    )
    with pytest.raises(BadInputError, match=f"in image 1 .seed 3. at evaluation 1 of 4, {said}"):
        sample_batch(model, spec, [0, 1, 2], weak=weak)


@pytest.mark.parametrize(("solver", "value"), [("ab2", NAN), ("heun", INF), ("ddim", INF), ("ddpm", NAN)])
def test_a_model_that_makes_nan_is_refused(pico: Callable[..., Pico], solver: str, value: float) -> None:
    model = pico().model()
    model.final_layer.linear.bias[0] = value
    with pytest.raises(BadInputError, match=r"in image 2 \(seed 3\) at evaluation 1 of \d+; is sampler (rf|ddpm)"):
        sample_batch(model, replace(SPEC, solver=solver), [2, 3, 4])


@pytest.mark.parametrize("solver", ["ab2", "ddpm"])
def test_one_broken_image_in_a_batch_is_enough(pico: Callable[..., Pico], solver: str) -> None:
    model = pico().model()
    model.y_embedder.embedding_table.weight[1] = NAN
    spec = replace(SPEC, solver=solver, cfg=1.0)
    sample_batch(model, spec, [0, 2, 3])
    with pytest.raises(BadInputError, match="NaN or infinite values in image 1 "):
        sample_batch(model, spec, [0, 1, 2])


@pytest.mark.parametrize("channels", [1, 4])
def test_pixel_models_and_latent_models(pico: Callable[..., Pico], channels: int) -> None:
    for learn_sigma in (True, False):
        model = pico(sampler="rf", in_channels=channels, learn_sigma=learn_sigma).model()
        assert sample_batch(model, SPEC, [0, 1]).shape == (2, channels, 8, 8)


@given(st.integers(1, 300).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(1, steps))))
def test_steps_of_bins_are_the_steps_that_fall_into_them(case: tuple[int, int]) -> None:
    steps, bins = case
    found = steps_of_bins(steps, bins)
    assert [step for part in found for step in part] == list(range(steps))
    assert [[step_bin(step, steps, bins) for step in part] for part in found] == [
        [b] * len(part) for b, part in enumerate(found)
    ]


FOLLOWABLE = [solver for solver in SOLVERS if solver not in ("heun", "ab3")]


def test_steps_that_cannot_be_followed_are_refused() -> None:
    with pytest.raises(UsageError, match="solver heun: evaluates the model twice in some steps"):
        check_followable(replace(SPEC, solver="heun"))
    with pytest.raises(UsageError, match="cfg_interval"):
        check_followable(replace(SPEC, interval=(0.1, 0.9)))
    for solver in FOLLOWABLE:
        check_followable(replace(SPEC, solver=solver))


@pytest.mark.parametrize("solver", ["ab2", "ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 10])
def test_sampling_times_are_those_that_a_sampler_asks_at(
    pico: Callable[..., Pico], solver: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico(sampler=SOLVERS[solver].family).model()
    monkeypatch.setattr(model, "forward", lambda x, *_: x.repeat(1, 2, 1, 1) * 0.1)
    spec = replace(SPEC, solver=solver, steps=steps, cfg=1.0)
    asked: list[float] = []
    sample_batch(model, spec, [0], Watchers(on_step=lambda _, t: asked.append(t)))
    assert [time.t for time in sampling_times(spec)] == asked
    shown: list[float] = []
    visit_noised(model, spec, [0], torch.ones(1, 4, 8, 8), Watchers(on_step=lambda _, t: shown.append(t)))
    assert shown == asked


def test_images_are_noised_as_in_training() -> None:
    clean, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for time in sampling_times(replace(SPEC, steps=10)):
        torch.testing.assert_close(time.noised(clean, noise), (1 - time.t) * clean + time.t * noise)
    for solver in ("ddim", "ddpm"):
        training = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)
        times = sampling_times(replace(SPEC, solver=solver, steps=10))
        assert [time.t for time in times] == sorted(sampling_schedule(solver, 10).timesteps, reverse=True)
        for time in times:
            kept = float(training[int(time.t)])
            torch.testing.assert_close(time.noised(clean, noise), kept**0.5 * clean + (1 - kept) ** 0.5 * noise)
